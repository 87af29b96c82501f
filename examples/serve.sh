#!/usr/bin/env bash
# Serve a model with the connector's one flag, and show with curl what reuse says in the response.
#
#   examples/serve.sh                                      the small model of this repository
#   examples/serve.sh Qwen/Qwen3-VL-2B-Instruct --port 8001    another model; further arguments go to `vllm serve`
#
# PYTHON names the Python that has vLLM (default: python3). The server runs until Ctrl-C. When nothing was reused, it is
# stopped and the exit status is 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

model=${1:-grid_model/model}
shift $(($# > 0))
port=8000
previous=
for argument in "$@"; do
  if [ "$previous" = --port ]; then port=$argument; fi
  previous=$argument
done
python=${PYTHON:-python3}
url=http://127.0.0.1:$port

# `vllm serve` is "$python" -m vllm.entrypoints.cli.main serve
"$python" -m vllm.entrypoints.cli.main serve "$model" --served-model-name example --host 127.0.0.1 \
  --max-model-len 8192 --limit-mm-per-prompt '{"image": 4, "video": 0}' --kv-transfer-config '{
    "kv_connector": "VLCacheConnector", "kv_connector_module_path": "vlcache_connector", "kv_role": "kv_both",
    "kv_connector_extra_config": {"recompute_ratio": 0.02, "host_gib": 2}}' "$@" &
server=$!
folder=$(mktemp --directory)
trap 'kill $server 2>/dev/null || true; wait $server || true; rm -r "$folder"' EXIT

until curl --silent --fail --output /dev/null "$url/health"; do
  kill -0 $server 2>/dev/null || { echo "the server ended while it started" >&2; exit 1; }
  sleep 1
done

# A picture as a data URL. Pictures of the web are given as their address.
picture=$("$python" -c 'from grid_model.chat import url_of; from offline import grid_pictures
print(url_of(grid_pictures(1)[0])["image_url"]["url"])')

ask() { # ask MODE TEXT_BEFORE_THE_PICTURE QUESTION FILE: the response goes to FILE, the seconds to standard output
  curl --silent --show-error --fail "$url/v1/chat/completions" --header 'Content-Type: application/json' \
    --output "$4" --write-out '%{time_total}' --data @- <<END
{"model": "example", "max_tokens": 8, "temperature": 0,
 "messages": [{"role": "user", "content": [
   {"type": "text", "text": "$2"},
   {"type": "image_url", "image_url": {"url": "$picture"}},
   {"type": "text", "text": "$3"}]}],
 "kv_transfer_params": {"vlcache": {"mode": "$1", "explain": true}}}
END
}

ask reuse "" "colour at c5" "$folder/first.json" >/dev/null # the picture is new: it is computed and stored
off=$(ask off "in the morning we opened the window" "shape at d2" "$folder/off.json")
reuse=$(ask reuse "in the evening we closed the window" "shape at d2" "$folder/reuse.json")

"$python" - "$folder/off.json" "$off" "$folder/reuse.json" "$reuse" <<'END'
import json
import sys

from savings import Answer, Savings


def answer(file, seconds):
    response = json.load(open(file))
    text, params = response["choices"][0]["message"]["content"], response["kv_transfer_params"]
    print(json.dumps({"kv_transfer_params": params}, indent=1), flush=True)
    return Answer(text.strip(), float(seconds), params["vlcache"])


plain, reuse = answer(*sys.argv[1:3]), answer(*sys.argv[3:5])
savings = Savings()
savings.show("the same picture under other text", reuse, plain)
sys.exit(savings.close())
END

echo "serving on $url until Ctrl-C; try: python examples/multi_turn.py --url $url"
wait $server
