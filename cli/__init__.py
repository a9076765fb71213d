"""The `lightpress` command: one thin file per verb, joined in `cli.app`."""
