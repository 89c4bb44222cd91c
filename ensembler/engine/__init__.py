"""The engine: members loaded, run and combined. It knows no texts, files or tasks."""
