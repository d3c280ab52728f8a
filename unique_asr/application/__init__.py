"""What the command line, the web page and a server share."""
