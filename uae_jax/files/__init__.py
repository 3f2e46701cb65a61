"""Files written completely or not at all: JSON, JSON lines, images. Imports nothing slow and nothing of the package."""
