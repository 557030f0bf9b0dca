# docker build -t gptforge .                                         for CPUs
# docker build -t gptforge --build-arg TORCH_BACKEND=cu130 .         for NVIDIA GPUs
# docker run --rm --gpus all -u "$(id -u):$(id -g)" -v "$PWD:/work" gptforge --input book.txt
FROM python:3.13-slim

# Triton and torch.compile call a compiler while the program runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# As uv knows it: cpu, cu126, cu130, ...
ARG TORCH_BACKEND=cpu
RUN --mount=type=bind,target=/src,rw \
    pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --torch-backend "$TORCH_BACKEND" '/src[demo,hf,gguf,data]'

# Caches, for any user: run it as yourself, so that the runs are yours. Torch asks for a name.
ENV HOME=/home/gptforge USER=gptforge
RUN mkdir --mode=1777 "$HOME"
WORKDIR /work
EXPOSE 7860
ENTRYPOINT ["gptforge"]
