# The web page, the server and the command line, from this folder alone. On a GPU (NVIDIA Container Toolkit):
#   docker build -t unique-asr .
#   docker run --rm --gpus all -p 127.0.0.1:7860:7860 -v unique-asr-jobs:/jobs unique-asr
# On a CPU: the same without --gpus, or 4 GB smaller with --build-arg TORCH=cpu.
# The server for other programs, with a key that clients have to send:
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 -e UNIQUE_ASR_API_KEY=secret unique-asr unique-asr-server host=0.0.0.0
# The command line, on the files of the current folder, which get their owner's rights:
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" -w /data unique-asr unique-asr audio=talk.m4a

FROM python:3.12-slim-bookworm

# Triton compiles a small launcher for each kernel with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# cuda: PyPI's wheels, which carry CUDA. cpu: PyTorch's own index; torch and torchaudio have to come from one build.
ARG TORCH=cuda
RUN if [ "$TORCH" = cpu ]; then \
        pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.16" "torchaudio>=2.11,<2.16"; \
    fi

# What the project needs has a layer of its own, which a change of the code leaves as it is.
WORKDIR /app
COPY pyproject.toml .
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['vad'], sep='\n')" > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt

# The files may be those of a strict umask: everybody has to read the weights.
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . && chmod -R a+rX .

# Anybody may be the user that runs it: caches go where everybody can write, jobs into the volume.
RUN useradd --create-home listener && mkdir /jobs && chown listener /jobs
ENV HOME=/tmp TRITON_CACHE_DIR=/tmp/triton
USER listener
VOLUME /jobs
EXPOSE 7860 8000
CMD ["unique-asr-app", "host=0.0.0.0", "jobs=/jobs"]
