"""The folder of a study: study.yaml, lock, attempts and checkpoints, the results of earlier sessions."""
