#!/usr/bin/env bash
# Makes the sample files of the examples: four seconds of picture and sound for each of three members, every
# one different, with a VP8 key frame every second. Needs Debian's ffmpeg.
set -euo pipefail
cd "$(dirname "$0")"

picture() { # name, source
  ffmpeg -hide_banner -loglevel error -y -f lavfi -i "$2" -t 4 -an -c:v libvpx -b:v 160k -g 15 -auto-alt-ref 0 \
    -deadline good -cpu-used 4 -f ivf "$1.ivf"
}
sound() { # name, frequency in Hz
  ffmpeg -hide_banner -loglevel error -y -f lavfi -i "sine=frequency=$2:sample_rate=48000" -t 4 -vn -ac 1 \
    -c:a libopus -b:a 24k -frame_duration 20 -f ogg "$1.ogg"
}

picture alice "testsrc=size=320x180:rate=15"
picture bob "smptebars=size=320x180:rate=15"
picture carol "testsrc2=size=320x180:rate=15"
sound alice 262
sound bob 330
sound carol 392
