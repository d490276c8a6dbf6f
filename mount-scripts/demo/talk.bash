# LMTP and IMAP by hand, with nothing but bash. Sourced by `demo`.
# Lines that begin with `>` were sent, with `<` received.

# shellcheck shell=bash

said() { printf '%s    %s %s%s\n' "$dim" "$1" "${2:0:110}" "$plain"; }

# The next line from the server, without its CR, in $line.
hear() {
    IFS= read -r -t 60 line <&"$peer" || { echo "the server hung up" >&2; return 1; }
    line=${line%$'\r'}
}

# Waits for a reply that begins with the given code.
lmtp_reply() {
    while hear; do
        [[ $line == ???-* ]] || break
    done
    said '<' "$line"
    [[ $line == "$1"* ]] || { echo "expected $1, got: $line" >&2; return 1; }
}

lmtp_say() { said '>' "$1"; printf '%s\r\n' "$1" >&"$peer"; }

# lmtp_deliver PORT RECIPIENT: the mail comes on standard input.
lmtp_deliver() {
    exec {peer}<>"/dev/tcp/127.0.0.1/$1"
    lmtp_reply 220
    lmtp_say "LHLO demo.test"
    lmtp_reply 250
    lmtp_say "MAIL FROM:<sender@demo.test>"
    lmtp_reply 250
    lmtp_say "RCPT TO:<$2>"
    lmtp_reply 250
    lmtp_say "DATA"
    lmtp_reply 354
    sed -e 's/^\./../' -e 's/$/\r/' >&"$peer"
    said '>' "(the mail)"
    lmtp_say "."
    lmtp_reply 250
    lmtp_say "QUIT"
    exec {peer}>&-
}

# imap_open PORT USER
imap_open() {
    exec {peer}<>"/dev/tcp/127.0.0.1/$1"
    hear
    tag=0
    imap "LOGIN $2 demo" >/dev/null
}

# imap COMMAND: prints the untagged answers; fails unless the server says OK.
imap() {
    tag=$((tag + 1))
    printf 'a%s %s\r\n' "$tag" "$1" >&"$peer"
    while hear; do
        case $line in
            "a$tag OK"*) return 0 ;;
            "a$tag "*) echo "IMAP: $1: $line" >&2; return 1 ;;
            *) printf '%s\n' "$line" ;;
        esac
    done
}

imap_close() {
    imap LOGOUT >/dev/null
    exec {peer}>&-
}
