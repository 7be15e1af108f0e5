"""Text, images, and the training data of stages 1 and 2."""

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."  # the question that a caption answers
