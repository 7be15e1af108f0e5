"""Images, and the data sets that stages 1 and 2 train on."""

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."  # what a caption is the answer to
