# keyreduce for a CPU; docs/install.md has the line for CUDA.
#   docker build -t keyreduce .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" keyreduce prune --state-ratio 0.5
ARG BASE=python:3.11-slim
FROM ${BASE}

# The CPU build of torch is not on PyPI. Its version has a local part (2.13.0+cpu), so that pip takes it before PyPI's.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

COPY . /src
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --constraint /src/configs/constraints.txt /src \
    && rm -rf /src

# Any user may run it: caches of Triton, matplotlib and the model hub go where everyone may write.
ENV HOME=/tmp
WORKDIR /data
ENTRYPOINT ["keyreduce"]
CMD ["--help"]
