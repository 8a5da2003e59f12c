#!/bin/sh
# Install what the demo ("demo"), the tests ("test"), those of them that need no host ("check"), the benchmarks ("bench")
# or the linters ("lint") need, and nothing that is there already:
# system packages where we may, a line that says what to install where we may not, and .venv for the rest.
set -eu

purpose=${1:-test}
cd "$(dirname "$0")/.."
# The system's Python, where it can make environments: a distribution builds it with optimizations that pyenv leaves out.
if [ -z "${PYTHON:-}" ] || [ "$PYTHON" = python3 ]; then
    PYTHON=python3
    /usr/bin/python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 9))' 2>/dev/null && PYTHON=/usr/bin/python3
fi
PATH=$PATH:/usr/sbin:/usr/local/sbin:/sbin

# missing: the things that are not there, in our words; packages() turns them into a package manager's names.
missing=
command -v ssh >/dev/null && command -v ssh-keygen >/dev/null || missing="$missing ssh"
command -v "$PYTHON" >/dev/null || missing="$missing python"
if [ "$purpose" != lint ] && [ "$purpose" != check ]; then
    command -v sshd >/dev/null || [ -x .sshd/sshd ] || missing="$missing sshd"
fi
[ -x .venv/bin/python ] || "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing venv"
if [ "$purpose" = test ] || [ "$purpose" = bench ]; then # each may be there without the other
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing="$missing chromium"
    command -v chromedriver >/dev/null || missing="$missing chromedriver"
fi
if [ "$purpose" = test ]; then
    if [ "$(id -u)" = 0 ]; then # root can make users with other login shells, and they need a Python of the system's
        [ -x /usr/bin/python3 ] || missing="$missing python"
        for shell in dash bash zsh fish ksh tcsh csh busybox; do
            command -v $shell >/dev/null || missing="$missing $shell"
        done
        if command -v apt-get >/dev/null; then # elsewhere the tests of Slurm skip: few others have packages of it
            for name in munged slurmctld slurmd sbatch ip; do
                command -v $name >/dev/null || missing="$missing $name"
            done
            for name in bwrap podman runc newuidmap debootstrap bindfs; do # elsewhere what needs them skips
                command -v $name >/dev/null || missing="$missing $name"
            done
            # R's kernel, where Debian has it; the tests of it skip where it is not there.
            if ! Rscript -e 'library(IRkernel)' >/dev/null 2>&1 && apt-cache show r-cran-irkernel >/dev/null 2>&1; then
                missing="$missing R"
            fi
        fi
    fi
fi
if [ "$purpose" = lint ]; then
    command -v shellcheck >/dev/null || missing="$missing shellcheck"
fi

packages() {
    for thing in $missing; do
        case $manager:$thing in
            apt-get:ssh) echo openssh-client ;;
            apt-get:sshd) echo openssh-server ;;
            apt-get:python) echo python3 ;;
            apt-get:venv) echo python3-venv ;;
            apt-get:chromedriver) echo chromium-driver ;;
            apt-get:munged) echo munge ;;
            apt-get:sbatch) echo slurm-client ;;
            apt-get:ip) echo iproute2 ;;
            apt-get:bwrap) echo bubblewrap ;;
            apt-get:newuidmap) echo uidmap ;;
            apt-get:R) echo r-base-core r-cran-irkernel ;;
            dnf:ssh | zypper:ssh) echo openssh-clients ;;
            dnf:sshd | zypper:sshd) echo openssh-server ;;
            dnf:python | dnf:venv | zypper:python | zypper:venv) echo python3 ;;
            dnf:shellcheck | zypper:shellcheck) echo ShellCheck ;;
            pacman:ssh | pacman:sshd | apk:ssh | apk:sshd) echo openssh ;;
            pacman:python | pacman:venv) echo python ;;
            pacman:chromedriver) echo chromium ;;
            apk:python | apk:venv) echo python3 ;;
            apk:chromedriver) echo chromium-chromedriver ;;
            brew:ssh | brew:sshd) echo openssh ;;
            brew:python | brew:venv) echo python ;;
            *) echo "$thing" ;;
        esac
    done | sort -u | tr '\n' ' '
}

idle=
parts=
trap 'rm -rf ${idle:+"$idle"} ${parts:+"$parts"}' EXIT

# unpack PLACE PACKAGE...: what these hold, without installing them.
unpack() {
    place=$1
    shift
    parts=${parts:-$(mktemp -d)}
    (cd "$parts" && apt-get download -qq "$@") >/dev/null 2>&1 || return
    rm -rf "$place"
    mkdir -p "$place"
    for part in "$parts"/*.deb; do
        dpkg -x "$part" "$place" || return
    done
    rm -rf "$parts"
    parts=
}

# Let apt-get know what packages there are, where we may.
update() {
    if [ "$(id -u)" = 0 ]; then apt-get update -qq; else sudo -n apt-get update -qq; fi >/dev/null 2>&1
}

# sshd's program is unpacked into .sshd, with the libraries that it lacks, and not installed: no daemon of the system's
# is started, now or at the next boot. For root, sshd insists on a user of its own.
unpack_sshd() {
    root=$PWD/.sshd/root
    names=$(apt-get install --simulate --no-install-recommends openssh-server 2>/dev/null | sed -n 's/^Inst \([^ ]*\).*/\1/p')
    # shellcheck disable=SC2086 # words on purpose
    [ -n "$names" ] && unpack "$root" $names || return
    libraries=$(find "$root" -name '*.so.*' -exec dirname {} + | sort -u | tr '\n' ':')
    options=
    for name in Session Auth; do # OpenSSH 9.8 and 10.0 made programs of their own of these
        program=$root/usr/lib/openssh/sshd-$(echo $name | tr SA sa)
        [ ! -x "$program" ] || options="$options -o 'Sshd${name}Path=$program'"
    done
    {
        echo '#!/bin/sh'
        echo "LD_LIBRARY_PATH='$libraries' exec '$root/usr/sbin/sshd'$options \"\$@\""
    } >.sshd/sshd
    chmod 755 .sshd/sshd
    if [ "$(id -u)" = 0 ] && ! grep -q '^sshd:' /etc/passwd; then
        useradd --system --no-create-home --home-dir /run/sshd --shell /usr/sbin/nologin sshd
        echo "setup: added the system user sshd, without which root's sshd does not run"
    fi
}

case $missing in
    *sshd*)
        if command -v apt-get >/dev/null && { unpack_sshd || { update && unpack_sshd; }; }; then
            echo "setup: unpacked sshd's program into .sshd; it is not installed"
            missing=$(echo "$missing" | sed 's/ sshd//')
        fi
        ;;
esac

if [ -n "$missing" ]; then
    manager=
    for candidate in apt-get dnf pacman zypper apk brew; do
        if command -v "$candidate" >/dev/null; then
            manager=$candidate
            break
        fi
    done
    case $manager in
        apt-get | dnf | zypper) install="$manager install -y" ;;
        pacman) install="pacman -S --noconfirm --needed" ;;
        apk) install="apk add" ;;
        brew) install="brew install" ;;
        *)
            echo "setup: please install:$missing" >&2
            exit 1
            ;;
    esac
    wanted=$(packages)
    sudo=
    if [ "$(id -u)" != 0 ] && [ "$manager" != brew ]; then
        if ! sudo -n true 2>/dev/null; then
            echo "setup: this needs more packages; please run: sudo $install $wanted" >&2
            case $manager:$missing in
                apt-get:*sshd*) echo "setup: that starts the system's sshd; to end it: sudo systemctl disable --now ssh" >&2 ;;
            esac
            case " $missing " in
                *" ssh "* | *" sshd "* | *" python "* | *" venv "* | *" shellcheck "*) exit 1 ;;
            esac
            echo "setup: going on without them; the tests that need them will skip" >&2
            install=
        fi
        sudo=sudo
    fi
fi

if [ -n "$missing" ] && [ -n "$install" ]; then
    if [ "$manager" = apt-get ]; then
        $sudo apt-get update -qq
        # shellcheck disable=SC2086 # words on purpose
        size=$($sudo apt-get install --assume-no --no-install-recommends $wanted 2>/dev/null |
            sed -n 's/^After this operation, \(.*\) of additional.*/ (\1, some minutes)/p')
    fi
    echo "setup: installing into the system by $manager${size:-}: $wanted"
    if [ "$manager" = apt-get ]; then
        # munge, Slurm and podman must not start a daemon of the system's on the developer's machine, now or at its next
        # boot. For this install, the programs by which a package starts one are found first in a directory where they do
        # nothing, and those by which it enables one leave disabled what is new, as its owner might have done: no upgrade
        # changes that. What was there before stays as it is.
        idle=$(mktemp -d)
        for name in invoke-rc.d deb-systemd-invoke; do
            ln -s /bin/true "$idle/$name"
        done
        cat >"$idle/deb-systemd-helper" <<'EOF'
#!/bin/sh
scope=
[ "$1" != --user ] || { scope=--user; shift; }
if [ "$1" = enable ] && ! /usr/bin/deb-systemd-helper $scope debian-installed "$2"; then
    shift
    set -- update-state "$@"
fi
exec /usr/bin/deb-systemd-helper $scope "$@"
EOF
        cat >"$idle/update-rc.d" <<'EOF'
#!/bin/sh
[ "$2" != defaults ] || set -- "$1" defaults-disabled
exec /usr/sbin/update-rc.d "$@"
EOF
        chmod 755 "$idle/deb-systemd-helper" "$idle/update-rc.d"
        install="env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
        install="$install -o DPkg::Path=$idle:/usr/sbin:/usr/bin:/sbin:/bin"
    fi
    case $manager:$missing in
        dnf:*sshd* | zypper:*sshd*) # these enable it as they install it, but for what is masked
            for unit in sshd.service sshd.socket; do
                [ -e /usr/lib/systemd/system/$unit ] || $sudo ln -s /dev/null /etc/systemd/system/$unit
            done
            echo "setup: sshd is masked, so that it does not start; to let it: systemctl unmask sshd.service sshd.socket"
            ;;
    esac
    # shellcheck disable=SC2086 # words on purpose
    $sudo $install $wanted >/dev/null
fi

# Grid Engine is unpacked where the tests find it, not installed: its packages bring a mail server and daemons. The
# tests that need it skip where there is none.
gridengine=/var/tmp/rjupyter-tests-0/gridengine
if [ "$purpose" = test ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -e $gridengine/complete ]; then
    echo "setup: unpacking Grid Engine into $gridengine (50 MB, 10 s)"
    names="gridengine-master gridengine-exec gridengine-client gridengine-common libjemalloc2"
    # shellcheck disable=SC2086 # words on purpose
    if unpack $gridengine $names || { apt-get update -qq && unpack $gridengine $names; } 2>/dev/null; then
        touch $gridengine/complete
    else
        echo "setup: this system has no packages of Grid Engine; the tests that need it will skip" >&2
    fi
fi

# Into .venv comes what the target needs, and no more; the stamp holds what was installed: a changed list installs again.
case $purpose in
    lint) size="200 MB, half a minute" ;;
    check) size="80 MB, half a minute" ;;
    *) size="400 MB, a minute" ;;
esac
wanted=$(sed -n "/#.*\\b$purpose\\b/s/ *#.*//p" tests/requirements.txt)
if [ "$(cat ".venv/requirements.$purpose" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing into .venv, for \`make $purpose\` ($size): $(echo "$wanted" | tr '\n' ' ')"
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    # shellcheck disable=SC2086 # words on purpose
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $wanted
    echo "$wanted" >".venv/requirements.$purpose"
fi
case $purpose in test | bench) .venv/bin/python tests/jupyters.py .venv ;; esac

image=/var/tmp/rjupyter-tests-0/image.tar
if [ "$purpose" = test ] && [ "$(id -u)" = 0 ] && command -v debootstrap >/dev/null && [ ! -e $image ]; then
    echo "setup: making an image for the tests of containers, $image (370 MB, a minute)"
    sh tests/image.sh $image .venv/bin/python || echo "setup: no image; the tests that need it will skip" >&2
fi

# As old as a month at most: what is the newest Python and OpenSSH changes.
sid=/var/tmp/rjupyter-tests-0/sid
if [ "$purpose" = test ] && [ "$(id -u)" = 0 ] && command -v debootstrap >/dev/null &&
    [ -z "$(find $sid/complete -mtime -30 2>/dev/null)" ]; then
    echo "setup: making a Debian sid in $sid, with the newest Python and ssh (700 MB with the tests' Jupyters, a minute)"
    sh tests/sid.sh $sid || echo "setup: no new Debian sid; without an older one, the tests that need it will skip" >&2
fi
