# The image nvidia_rn50: docker/build.sh builds it, docker/run.sh runs it (docs/docker.md).
#
# BASE_IMAGE contains Python 3.11 or newer with pip. If it has torch, this torch is kept; otherwise
# the release on PyPI is installed.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.05-py3

# The Python environment, in a stage of its own: neither pip's cache nor the compilers and checkouts
# of the optional builds reach the image, and a change of the source does not repeat it.
FROM ${BASE_IMAGE} AS environment

# NGC images constrain every package to the version they hold: a newer one could not be installed.
ENV PIP_CONSTRAINT= \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# A virtual environment, because Linux distributions do not let pip add packages to the system's
# Python. It sees the packages of the base image and uses the pip of the base image.
RUN python3 -m venv --system-site-packages --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/requirements
COPY requirements.txt requirements-dev.txt ./

# If the torch of the base image is too old, this is an error: replacing it would leave two torches.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip list --format=freeze >installed.txt \
    && sed -n '/^torch\(vision\)\{0,1\}==/p' installed.txt >constraints.txt \
    && python -m pip install --constraint constraints.txt --requirement requirements-dev.txt

# dllogger and apex are optional: without them the project writes the log itself and uses torch's SGD.
ARG WITH_DLLOGGER=0
ARG DLLOGGER_REF=v1.1.0
RUN if [ "$WITH_DLLOGGER" = 1 ]; then \
        python -m pip install --no-cache-dir \
            "dllogger @ git+https://github.com/NVIDIA/dllogger@$DLLOGGER_REF"; \
    fi

ARG WITH_APEX=0
ARG APEX_REF=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
RUN if [ "$WITH_APEX" = 1 ] && ! python -m pip show --quiet apex; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 python -m pip install --no-cache-dir --no-build-isolation \
            "apex @ git+https://github.com/NVIDIA/apex@$APEX_REF"; \
    fi


# The compiled parts of the package, where the base image has a compiler; elsewhere they are compiled
# at their first use, if one is found then.
FROM environment AS kernels
WORKDIR /opt/kernels
COPY sparse sparse
RUN mkdir sparse/native/prebuilt \
    && if command -v c++; then python -m sparse.native; fi


FROM ${BASE_IMAGE}

# The base image may have a user with this UID already; docker/run.sh may choose any other UID.
ARG USER_ID=1000
ARG GROUP_ID=1000
RUN groupadd --non-unique --gid "$GROUP_ID" trainer \
    && useradd --non-unique --no-log-init --uid "$USER_ID" --gid "$GROUP_ID" --create-home trainer \
    && mkdir -p /data/imagenet \
    && chmod 1777 /home/trainer

COPY --from=environment /opt/venv /opt/venv

# HOME and LOGNAME: torch and matplotlib ask for them, and a chosen user has no passwd entry.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHON=/opt/venv/bin/python \
    HOME=/home/trainer \
    LOGNAME=trainer \
    PIP_CONSTRAINT= \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video

WORKDIR /workspace/rn50
COPY . .
COPY --from=kernels /opt/kernels/sparse/native/prebuilt sparse/native/prebuilt

# The checkout may come from a umask that lets its owner alone read; any user may write results.
ARG GIT_COMMIT=unknown
RUN printf '%s\n' "$GIT_COMMIT" >COMMIT && chmod -R a+rX . && chmod 1777 . results

ARG BASE_IMAGE
LABEL org.opencontainers.image.title="nvidia_rn50" \
      org.opencontainers.image.description="Sparse training of ResNet-50 on ImageNet with PyTorch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$GIT_COMMIT" \
      org.opencontainers.image.base.name="$BASE_IMAGE"

USER $USER_ID:$GROUP_ID

# The check runs rarely, because it starts a Python with torch beside the training.
HEALTHCHECK --interval=30m --timeout=2m CMD ["python", "main.py", "--version"]
CMD ["bash"]
