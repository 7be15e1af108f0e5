"""Images, and the data sets that stages 1 and 2 train on."""
