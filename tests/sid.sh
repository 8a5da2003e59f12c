#!/bin/sh
# Make the Debian sid in which the tests run the newest Python and OpenSSH: its python3, each newer one that it has, and
# ssh and sshd.
#
# usage: sid.sh TREE; it needs root, debootstrap and the network. A TREE that is there is replaced when the new one is
# complete. Nothing in it starts by itself.
set -eu

tree=$1
# shellcheck disable=SC1091
. /etc/os-release
mirror= # debootstrap's own, where apt does not say which this Debian uses
# shellcheck disable=SC2016 # for apt-get
[ "$ID" != debian ] || mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -1)
new=$tree.new
rm -rf --one-file-system -- "$new"
mkdir -p "$(dirname "$tree")"
trap 'rm -rf --one-file-system -- "$new" "$new.log"' EXIT
trap 'exit 130' INT TERM

# shellcheck disable=SC2086 # words on purpose
{
    debootstrap --variant=minbase --include=python3,python3-venv,openssh-client,openssh-server,procps \
        sid "$new" $mirror &&
        printf '#!/bin/sh\nexit 101\n' >"$new/usr/sbin/policy-rc.d" &&
        chmod 755 "$new/usr/sbin/policy-rc.d" &&
        # A mirror may be some days behind what it says of itself.
        chroot "$new" apt-get -o Acquire::Check-Valid-Until=false update -qq &&
        own=$(chroot "$new" python3 -c 'import sys; print(sys.version_info[1])') &&
        newer=$(chroot "$new" apt-cache pkgnames python3. | sed -n 's/^\(python3\.\([0-9]*\)\)-venv$/\2 \1 \1-venv/p' |
            awk -v own="$own" '$1 > own { print $2, $3 }') &&
        chroot "$new" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends procps $newer
} >"$new.log" 2>&1 || {
    tail -5 "$new.log" >&2
    exit 1
}
# What leads pip to packages on this machine.
for file in /etc/pip.conf "${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}"; do
    [ ! -f "$file" ] || install -D -m 644 "$file" "$new$file"
done
rm -rf "$new"/var/cache/apt/* "$new"/var/lib/apt/lists/* "$new"/usr/share/doc "$new"/usr/share/locale
chmod 755 "$new"
touch "$new/complete"
rm -rf --one-file-system -- "$tree"
mv "$new" "$tree"
