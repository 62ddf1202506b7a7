#!/bin/sh
# A container that is a Ray node is well while its raylet answers; one that runs a command, while that is there.
case "$(tr '\0' ' ' </proc/1/cmdline)" in
*"ray start"*)
    exec wget --quiet --tries=1 --timeout=5 --output-document=- \
        "http://127.0.0.1:${RAY_AGENT_PORT:-52365}/api/local_raylet_healthz"
    ;;
esac
