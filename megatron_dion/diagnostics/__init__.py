"""What a step of Dion did, in figures for people who tune: docs/diagnostics.md."""
