"""Model folders as files: their parts, checks of these parts, and conversion to other folders."""
