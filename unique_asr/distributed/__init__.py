"""Archives: the jobs of the command line on many workers, of one machine or of a cluster."""
