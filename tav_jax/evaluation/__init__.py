"""The page that shows edits beside their source."""
