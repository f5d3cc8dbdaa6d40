"""The passes that come with onnxopt, one file each."""
