# What install-site and install-coordinator share. Sourced by them; does nothing by itself. Every step may be repeated: what is there
# already is left alone or replaced by the same.
# shellcheck shell=bash

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s: %s\n' "$COMMAND" "$1" >&2; [ -z "${2-}" ] || printf 'hint: %s\n' "$2" >&2; exit "${3:-1}"; }

# need_machine: root, systemd, and a Python that can make a venv. Sets python.
need_machine() {
    [ "$(id -u)" = 0 ] || fail 'not root' "run it with sudo"
    [ -d /run/systemd/system ] || fail 'systemd does not run here' 'see docs/operating/install-site.md for other ways'
    [ -z "$python" ] || return 0
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            return 0
        fi
    done
    fail 'no Python 3.11 or newer with its venv module' 'apt-get install python3-venv (Debian 12 or newer), or give --python'
}

# check_wheelhouse: the folder holds what its requirements.txt says, and that is what the giver meant. Sets digest.
check_wheelhouse() {
    [ -f "$wheelhouse/requirements.txt" ] || fail "$wheelhouse holds no requirements.txt" 'make one with deploy/airgap/wheelhouse, or give --wheelhouse'
    digest=$(sha256sum "$wheelhouse/requirements.txt" | cut -d' ' -f1)
    if [ -n "$expected_digest" ] && [ "$digest" != "$expected_digest" ]; then
        fail "requirements.txt has the digest $digest, not $expected_digest" 'the folder is not the one that was meant: fetch it again'
    fi
}

# make_user NAME HOME TEXT: a system user without a password or a shell.
make_user() {
    mkdir -p /etc/sysusers.d
    printf 'u %s - "%s" %s\n' "$1" "$3" "$2" >"/etc/sysusers.d/$1.conf"
    systemd-sysusers "/etc/sysusers.d/$1.conf"
}

# make_venv PREFIX: PREFIX/DIGEST with every release of requirements.txt, and PREFIX/current pointing at it. The one before stays for
# going back; older ones go. Ours to read, root's to write.
make_venv() {
    local prefix=$1 venv=$1/${digest:0:16} before
    if [ -e "$venv/.complete" ]; then
        say "packages: $venv is there already"
    else
        say "packages: installing $(grep -c -- --hash= "$wheelhouse/requirements.txt") releases into $venv"
        rm -rf "$venv"
        mkdir -p "$prefix"
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-index --find-links "$wheelhouse" \
            --require-hashes --only-binary :all: -r "$wheelhouse/requirements.txt" \
            || { rm -rf "$venv"; fail 'pip refused the wheelhouse' 'its files do not match requirements.txt, or are for another Python or machine'; }
        chmod -R u=rwX,go=rX "$venv"
        touch "$venv/.complete"
    fi
    before=$(readlink "$prefix/current" || true)
    if [ "$before" != "${venv##*/}" ]; then
        ln -sfn "${venv##*/}" "$prefix/current.new"
        mv -T "$prefix/current.new" "$prefix/current"
        find "$prefix" -mindepth 1 -maxdepth 1 -type d ! -name "${venv##*/}" ! -name "${before:-none}" -exec rm -rf {} +
        return 0
    fi
}

# write_command NAME PREFIX USER: /usr/local/bin/NAME, which does as USER what root asks, so that every file keeps its owner.
write_command() {
    cat >"/usr/local/bin/$1.new" <<COMMAND
#!/bin/sh
# Written by $COMMAND: runs $1 as the user of its daemon.
if [ "\$(id -u)" = 0 ]; then
    cd / && exec setpriv --reuid=$3 --regid=$3 --init-groups --inh-caps=-all -- env HOME=/ $2/current/bin/$1 "\$@"
fi
exec $2/current/bin/$1 "\$@"
COMMAND
    chmod 0755 "/usr/local/bin/$1.new"
    mv "/usr/local/bin/$1.new" "/usr/local/bin/$1"
}

# write_unit NAME: the unit beside this script, and what only newer systemds know as a drop-in.
write_unit() {
    install -m 0644 "$here/$1.service" "/etc/systemd/system/$1.service"
    local drop_ins=/etc/systemd/system/$1.service.d version
    mkdir -p "$drop_ins"
    version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    if [ "${version:-0}" -ge 254 ]; then
        printf '# Written by %s: 5 s after the first failure, up to 5 minutes after the eighth.\n[Service]\nRestartSteps=8\nRestartMaxDelaySec=5min\n' \
            "$COMMAND" >"$drop_ins/20-backoff.conf"
    else
        rm -f "$drop_ins/20-backoff.conf"
    fi
}

# standing NAME PREFIX: a digest of what a restart would take up, to see whether one is needed.
standing() {
    { readlink "$2/current"; cat "/etc/systemd/system/$1.service" "/etc/systemd/system/$1.service.d/"*.conf; } 2>/dev/null | sha256sum
}

# reload_daemon NAME PREFIX BEFORE: enabled, and restarted where it runs and differs from BEFORE.
reload_daemon() {
    systemctl daemon-reload
    systemctl --quiet enable "$1.service"
    if [ "$(standing "$1" "$2")" != "$3" ] && systemctl --quiet is-active "$1.service"; then
        systemctl restart "$1.service"
        say "restarted $1"
    fi
}

# remove_daemon NAME PREFIX: stops it and takes away everything but its own data and configuration.
remove_daemon() {
    if [ -e "/etc/systemd/system/$1.service" ]; then
        systemctl disable --now "$1.service" 2>/dev/null || true
    fi
    rm -rf "/etc/systemd/system/$1.service" "/etc/systemd/system/$1.service.d" "$2"
    rm -f "/usr/local/bin/$1"
    systemctl daemon-reload
    systemctl reset-failed "$1.service" 2>/dev/null || true
}

# purge_daemon NAME FOLDER...: its data, configuration and user. Keys do not come back.
purge_daemon() {
    local name=$1
    shift
    rm -rf "$@"
    rm -f "/etc/sysusers.d/$name.conf"
    if id "$name" >/dev/null 2>&1; then
        userdel "$name"
    fi
}
