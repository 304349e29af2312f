"""What a model is: its configuration, what a rank is given of it, its weights, what its forward keeps."""
