#!/bin/sh
# The first minutes of a newcomer, on a bare Debian in which nothing is installed: clone, `make demo`, then the goals that
# are named (`check`, or `test` with PYTEST_ARGS), as an ordinary user who may not install packages, as root, and as what
# is left of root in a container that nobody made privileged.
#
#     sudo sh tests/newcomer.sh check
#
# Needs debootstrap, and 2 GB where TMPDIR is. What leads to packages on this machine is copied: resolv.conf, pip's
# configuration, certificates; NEWCOMER_MOUNTS names directories that are to be seen there too, of wheels for example.
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
bare=$(mktemp -d)
chmod 755 "$bare"
leave() {
    # Under a lazy umount nothing of this machine's own /dev can be removed with the rest.
    grep -o " ${bare}[^ ]*" /proc/mounts | sort -r | xargs -r umount -l
    rm -rf --one-file-system -- "$bare" "$bare.log"
}
trap leave EXIT
trap 'exit 130' INT TERM

echo "newcomer: making a bare Debian in $bare"
suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
packages=make,git,python3,python3-venv,openssh-client,ca-certificates
debootstrap --variant=minbase --include="$packages" "$suite" "$bare" >"$bare.log" 2>&1 || {
    tail -5 "$bare.log" >&2
    exit 1
}
mount --bind "$bare" "$bare" # a mount point, or no namespaces can be made in it
mount --make-private "$bare"
mount --bind /dev "$bare/dev"
mount -t devpts devpts "$bare/dev/pts"
mount -t proc proc "$bare/proc"
[ -e "$bare/etc/hosts" ] || echo "127.0.0.1 localhost" >"$bare/etc/hosts"
settings="export LANG=C.UTF-8"
for file in /etc/resolv.conf /etc/pip.conf "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}"; do
    [ ! -f "$file" ] || install -D -m 644 "$file" "$bare$file"
done
for name in PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CERT SSL_CERT_FILE PYTEST_ARGS; do
    value=$(printenv $name) || continue
    settings="$settings $name='$value'"
done
for place in ${NEWCOMER_MOUNTS:-}; do
    mkdir -p "$bare$place"
    mount --bind "$place" "$bare$place"
done
chroot "$bare" apt-get update -qq
chroot "$bare" useradd -m -s /bin/bash ana

# What starts by itself at the next boot, or at a login, of what is not the system's own.
enabled() {
    chroot "$bare" sh -c 'find /etc/systemd /etc/rc?.d -type l' | grep -E '\.wants/|/S[0-9]' |
        grep -E 'ssh|munge|slurm|podman' || true
}

# docker's list of what it leaves to root.
some="-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+net_raw,+sys_chroot"
some="$some,+mknod,+audit_write,+setfcap"

for who in ${NEWCOMERS:-ana root contained}; do
    user=root
    less=
    case $who in
        ana) user=ana ;;
        contained) less="setpriv --bounding-set $some" ;;
    esac
    home=$(chroot "$bare" sh -c "echo ~$user")
    git clone -q "$top" "$bare$home/$who"
    chroot "$bare" chown -R $user: "$home"
    # shellcheck disable=SC2086 # words on purpose
    go() { $less chroot "$bare" su - $user -c "$settings; cd $who && $1"; }
    echo "newcomer: make demo, as $who"
    go "make demo DEMO_ARGS='demo list'"
    go "printf '%s\\n' 'rjupyter -f demo:work' 'rjupyter demo:work' 'rjupyter demo execute hello.ipynb' |
        make demo" 2>&1 | tee "$bare/tmp/demo"
    [ "$(grep -c '^http://127.0.0.1:' "$bare/tmp/demo")" = 2 ]
    grep -q '^hello.executed.ipynb$' "$bare/tmp/demo"
    for goal in "$@"; do
        echo "newcomer: make $goal, as $who"
        go "make $goal"
    done
    go "make clean"
    [ -z "$(enabled)" ] || {
        echo "newcomer: this is enabled now: $(enabled)" >&2
        exit 1
    }
done
echo "newcomer: all is well"
