"""How others keep soft labels, and how other libraries read ours."""
