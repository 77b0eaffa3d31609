"""What measured steps say to people who tune, once a run has written them: docs/diagnostics.md."""
