# The server and the page of compose.yaml. Models are mounted at /app/runs: no weights are copied in but the tiny base.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements.lock ./
RUN python3 -m venv .venv && \
    .venv/bin/python -m pip install --no-cache-dir --require-hashes --no-deps --requirement requirements.lock
COPY helpers helpers
ENV PATH=/app/.venv/bin:$PATH HOME=/tmp
USER nobody
CMD ["python", "-m", "helpers.use.serve", "--host", "0.0.0.0"]
