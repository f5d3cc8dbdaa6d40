"""What a model holds and what passes could win on it; how two models differ. Nothing here changes a model."""
