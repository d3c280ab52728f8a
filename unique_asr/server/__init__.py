"""A server for other programs, with OpenAI's interface for transcriptions: see docs/web-page-and-server.md."""
