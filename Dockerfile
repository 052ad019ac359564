# The demo in a container: docker build -t fedmef-fx . && docker run --rm fedmef-fx
# Wheels of torch for the CPU alone; other arguments run other commands: docker run --rm fedmef-fx inspect resnet18 --json
FROM python:3.13-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
COPY . /source
RUN pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.13-slim
COPY --from=build /wheels /wheels
COPY constraints.txt /constraints.txt
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c /constraints.txt /wheels/*.whl
WORKDIR /work
ENTRYPOINT ["fedmef-fx"]
CMD ["demo"]
