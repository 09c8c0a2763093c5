# docker build -t repcon .                            torch for the CPU
# docker build -t repcon --build-arg TORCH=cu130 .    torch for CUDA 13.0; run it with --gpus all
# docker run --rm -v "$PWD:/data" repcon consolidate --proxy photos --teachers a=MODEL_A b=MODEL_B --out runs/one
FROM python:3.11-slim

# The name of an index below https://download.pytorch.org/whl.
ARG TORCH=cpu
# Extras of pyproject.toml, by commas.
ARG EXTRAS=hf,s3

# Triton and torch.compile call a compiler at run time.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt ./
# Beside PyPI, which has the other packages: of one version pip takes the build with a suffix, 2.13.0+cpu.
RUN pip install --no-cache-dir --constraint constraints.txt torch torchvision \
    --extra-index-url "https://download.pytorch.org/whl/${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY repcon repcon
COPY kernels kernels
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" && repcon --version

WORKDIR /data
ENTRYPOINT ["repcon"]
