"""Model folders as files: which parts they hold, whether these are whole, and how they become other folders."""
