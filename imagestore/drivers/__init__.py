"""The drivers that come with imagestore, a module each. They are loaded by name, through their entry points."""
