"""Images, cached moments and loaders."""
