#!/usr/bin/env bash
# Unpack ImageNet (ILSVRC 2012) into DATA/train/<class>/ and DATA/val/<class>/:
#
#   bash scripts/prepare_imagenet.sh TARBALLS DATA
#
# TARBALLS holds the three files that https://image-net.org/download-images.php offers for 2012:
#   ILSVRC2012_img_train.tar       training images, 138 GB
#   ILSVRC2012_img_val.tar         validation images, 6.3 GB
#   ILSVRC2012_devkit_t12.tar.gz   development kit: the classes of the validation images
# DATA needs about 150 GB; the tarballs are read in place and can be deleted afterwards. Checks their
# MD5, unpacks with one process per core (JOBS), counts what came out. When interrupted, run it
# again: finished classes are kept.
#
#   --md5 FILE          check against this list (as md5sum writes it), for other releases
#   --count TRAIN,VAL   expect these numbers of images (default 1281167,50000)
set -euo pipefail

fail() {
    echo "prepare_imagenet.sh: error: $*" >&2
    exit 2
}

jobs=${JOBS:-$(nproc)}
counts=1281167,50000
md5='1d675b47d978889d74fa0da5fadfb00e  ILSVRC2012_img_train.tar
29b22e2961454d5413ddabcf34fc5622  ILSVRC2012_img_val.tar
fa75699e90414af021442c21a62c3abf  ILSVRC2012_devkit_t12.tar.gz'
while [[ ${1:-} == -* ]]; do
    case $1 in
        --md5) md5=$(<"${2:?is the list of --md5}") ;;
        --count) counts=${2:?is what --count expects} ;;
        *) fail "unknown flag $1; the first lines of $0 explain its use" ;;
    esac
    shift 2
done
(($# == 2)) || fail "needs two directories: where the tarballs are, and where the images go"
[[ $counts =~ ^[0-9]+,[0-9]+$ ]] || fail "--count takes TRAIN,VAL, not $counts"
source=$1
mkdir -p "$2"
data=$(cd "$2" && pwd)
state=$data/.prepare # what is done, and what is being unpacked
mkdir -p "$state"
exec 9>"$state/lock"
flock --nonblock 9 || fail "another prepare_imagenet.sh is at work in $data"

# tarball NAME: print its path when it is there and intact; a check is done once per file.
tarball() {
    local file=$source/$1 wanted is
    [[ -f $file ]] || fail "there is no $1 in $source: get it from image-net.org"
    wanted=$(awk -v name="$1" '$2 == name || $2 == "*" name { print $1 }' <<<"$md5")
    [[ $wanted ]] || fail "the list of --md5 has no line for $1"
    stamp=$wanted-$(stat --format %s-%Y "$file")
    if [[ $(cat "$state/$1.md5" 2>/dev/null) != "$stamp" ]]; then
        echo "checking the MD5 of $1" >&2
        is=$(md5sum <"$file" | cut -d' ' -f1)
        [[ $is == "$wanted" ]] || fail "$file is damaged (MD5 $is, not $wanted): download it again"
        echo "$stamp" >"$state/$1.md5"
    fi
    echo "$file"
}

# Fails before hours of work, not after them.
require_space() {
    local tar=$1 needed free
    needed=$(($(stat --format %s "$tar") - $(du --summarize --bytes "$2" | cut -f1)))
    free=$(df --output=avail --block-size=1 "$data" | tail -n 1)
    ((free >= needed)) || fail "$data has $((free >> 30)) GiB free and" \
        "$((needed >> 30)) GiB more are needed"
}

# unpack_class TARBALL CLASS: one class of the training images, complete or not at all.
unpack_class() {
    local part=$PARTS/$2
    rm -rf "$part" && mkdir "$part" &&
        tar --extract --to-stdout --seek --occurrence=1 --file "$1" "$2.tar" |
        tar --extract --no-same-owner --directory "$part" &&
        mv "$part" "$TRAIN/$2"
}

unpack_train() {
    local tar class todo=()
    mkdir -p "$data/train"
    tar=$(tarball ILSVRC2012_img_train.tar)
    require_space "$tar" "$data/train"
    while read -r class; do
        [[ -d $data/train/$class ]] || todo+=("$class")
    done < <(tar --list --seek --file "$tar" | sed 's/\.tar$//')
    echo "unpacking ${#todo[@]} classes of training images" >&2
    export -f unpack_class
    ((${#todo[@]} == 0)) || printf '%s\n' "${todo[@]}" |
        PARTS=$state TRAIN=$data/train xargs --max-procs "$jobs" --replace=CLASS \
            bash -o pipefail -c 'unpack_class "$@" || exit 255' _ "$tar" CLASS ||
        fail "unpacking stopped before its end; finished classes are kept for the next run"
    touch "$state/train.done"
}

# validation_classes KIT: print "<class> <file>" for every validation image.
validation_classes() {
    "$PYTHON" -c 'import scipy' 2>/dev/null ||
        fail "$PYTHON has no scipy, which reads the development kit: set PYTHON to one that has"
    "$PYTHON" - "$1" <<'PYTHON'
import io, sys, tarfile
from scipy.io import loadmat

with tarfile.open(sys.argv[1]) as kit:
    files = {member.name.rsplit("/")[-1]: member for member in kit.getmembers() if member.isfile()}
    read = lambda name: kit.extractfile(files[name]).read()
    meta = loadmat(io.BytesIO(read("meta.mat")), squeeze_me=True)["synsets"]
    truth = read("ILSVRC2012_validation_ground_truth.txt").split()
classes = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in meta}
for number, label in enumerate(truth, 1):
    print(classes[int(label)], f"ILSVRC2012_val_{number:08}.JPEG")
PYTHON
}

unpack_val() {
    local tar kit part=$state/val class
    tar=$(tarball ILSVRC2012_img_val.tar)
    kit=$(tarball ILSVRC2012_devkit_t12.tar.gz)
    rm -rf "$part" && mkdir -p "$part/flat" "$part/sorted"
    require_space "$tar" "$part"
    validation_classes "$kit" >"$state/val.txt"
    echo "unpacking the validation images" >&2
    tar --extract --no-same-owner --file "$tar" --directory "$part/flat"
    while read -r class; do
        mkdir "$part/sorted/$class"
        awk -v class="$class" '$1 == class { print $2 }' "$state/val.txt" |
            (cd "$part/flat" && xargs mv --target-directory "../sorted/$class")
    done < <(cut -d' ' -f1 "$state/val.txt" | sort --unique)
    mv "$part/sorted" "$data/val"
    rm -rf "$part"
}

# verify SPLIT IMAGES
verify() {
    local images classes
    images=$(find "$data/$1" -type f -size +0 | wc -l)
    classes=$(find "$data/$1" -mindepth 1 -maxdepth 1 -type d | wc -l)
    if ((images != $2)); then
        rm -f "$state/$1.done"
        fail "$data/$1 holds $images images, not $2: delete what is damaged and run this again"
    fi
    echo "$1: $images images in $classes classes"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$root/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
[[ -d $data/val ]] || unpack_val
[[ -d $data/train && -e $state/train.done ]] || unpack_train
verify train "${counts%,*}"
verify val "${counts#*,}"
