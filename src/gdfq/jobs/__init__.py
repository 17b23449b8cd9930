"""The command line's jobs: the pipeline with files around it. One module a command."""
