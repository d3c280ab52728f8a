# make transcribe                      transcribes a bundled recording
# make transcribe audio=talk.m4a       transcribes any audio or video file; options="output.format=srt" passes options on
# make app                             opens the web page on http://127.0.0.1:7860; options="port=8000" passes options on
# make server                          opens a server for other programs on http://127.0.0.1:8000
# make test                            runs the tests; those of the page in a browser need chromium (.ci/install_chromium)
# All make .venv first, with the first of these that is Python 3.11 or later; PYTHON=... names another.

PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
sample := tests/data/sample.opus

export audio

.PHONY: transcribe app server test clean

transcribe: .venv/installed
	@.venv/bin/python scripts/transcribe.py output.overwrite=true \
		$(if $(audio),"audio=$$audio",audio=$(sample) output.dir=transcripts) $(options)

app: .venv/installed
	@.venv/bin/python -m unique_asr.app $(options)

server: .venv/installed
	@.venv/bin/python -m unique_asr.server $(options)

test: .venv/installed
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(options)

# The stamp is newer than pyproject.toml once everything has been installed: later calls go straight to work.
.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; name another with PYTHON=..." >&2; exit 1; }
	@echo "Installing into .venv: once, some minutes"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv build dist transcripts
