"""Files that are whole or not there, JSON and JSON lines, pictures; imports nothing slow and nothing of the package."""
