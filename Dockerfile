# The image of a pod (docs/pods.md): build it with `docker build --tag IMAGE .`; another Python with --build-arg PYTHON=3.13.
# What is installed is pinned with hashes in requirements/ (make lock). 3.11 is what `make test` runs on.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
ARG PYTHON

# As process 1 Python would not hear SIGTERM before it has a handler; tini hands it on, and ends with Python's exit code.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home lingbot \
    && install --directory --owner=1000 /app
WORKDIR /app

COPY requirements/pod-${PYTHON}.txt requirements/
RUN pip install --no-cache-dir --require-hashes --requirement=requirements/pod-${PYTHON}.txt \
    && pip check
COPY --chown=1000 . .

USER 1000
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1
ENTRYPOINT ["tini", "--", "python", "-m"]
CMD ["experiments.train", "--help"]
