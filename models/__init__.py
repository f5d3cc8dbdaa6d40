"""Small models trained by committed scripts, and the catalogue of larger public ones."""
