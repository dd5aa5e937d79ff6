"""Block pruning and INT4 for aligned pipelines. Nothing here yet: it comes with its own issue."""
