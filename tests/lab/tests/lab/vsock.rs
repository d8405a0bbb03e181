//! Sockets between host and guest by a Unix socket, which programs on the host connect to and listen beside.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Host, Lab};

use crate::assigned::{guest, zoo};
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::new(
    "vsock_by_a_unix_socket_moves_data_whose_halves_end_by_themselves_over_pauses_and_a_restart",
    by_a_socket,
)];

/// What the guest does in its first life and its second, by what the host says of that at port 9. `socat` ends its half when
/// it has sent all, and reads on for an answer; at port 8 somebody reads late. Of sixteen at once each has its answer.
const SCRIPT: &str = r#"
first() { cut -d ' ' -f 1; }
ask() { socat -t 60 - "VSOCK-CONNECT:2:$1" </tmp/up | first; }
socat -t 60 VSOCK-LISTEN:5,fork,reuseaddr SYSTEM:sha256sum &
life=$(socat -t 60 - VSOCK-CONNECT:2:9 </dev/null)
head -c 2097152 /dev/urandom >/tmp/up
value "sent_$life" "$(sha256sum </tmp/up | first)"
value "answer_$life" "$(ask 6)"
value "late_$life" "$(ask 8)"
for each in $(seq 16); do ask 6 >"/tmp/many.$each" & many="$many $!"; done
for each in $many; do wait "$each"; done
value "many_$life" "$(cat /tmp/many.* | sort -u)"
value "nobody_$life" "$(socat -t 5 - VSOCK-CONNECT:2:4 </dev/null 2>&1 | grep -c -i reset)"
until_pressed "moving_$life"
value "busy_$life" begun
value "paused_$life" "$(for each in 1 2 3 4; do ask 6; done | sort -u)"
until_pressed "ending_$life"
[ "$life" != first ] || reboot -f
{ dmesg | grep -iE 'virtio|vsock' | grep -iE 'fail|error|warn|bug' || true; } | block complaints
"#;

/// Each way, each half ending by itself, with checksums; a program that reads late, sixteen at once, and a port where nobody
/// listens. Over pauses in the midst of data, and after a restart, which ends what the guest had and leaves the socket. Clients
/// that say nonsense, or nothing, are let go and disturb nobody.
fn by_a_socket(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    host.run("set -e; mkdir -p /run/vsock; cd /run/vsock; rm -f s*; head -c 2M /dev/urandom >data; echo first >life")?;
    let servers = [
        "exec socat -t 60 UNIX-LISTEN:/run/vsock/s_6,fork SYSTEM:sha256sum",
        "exec socat -t 60 UNIX-LISTEN:/run/vsock/s_8,fork SYSTEM:'sleep 2; sha256sum'",
        "exec socat -t 60 UNIX-LISTEN:/run/vsock/s_9,fork SYSTEM:'cat /run/vsock/life'",
    ];
    let servers: Vec<_> = servers
        .into_iter()
        .map(|script| host.spawn(script))
        .collect::<Result<_>>()?;
    // One that nobody listens at any more is no hindrance.
    host.run(
        "timeout 1 socat UNIX-LISTEN:/run/vsock/s,unlink-close=0 - </dev/null; [ -S /run/vsock/s ]",
    )?;
    let run = guest()?
        .cpus(2)
        .programs()
        .args(&["--vsock", "cid=7,socket=/run/vsock/s"])
        .args(&SOCKET)
        .limit(Duration::from_secs(240))
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    for life in ["first", "second"] {
        running.wait_line(&format!("@@value moving_{life}"))?;
        into_the_guest(host)?;
        host.run(NONSENSE)?;
        host.run(&format!("{CTL} power-button"))?;
        running.wait_line(&format!("@@value busy_{life}"))?;
        host.run(&format!(
            "for each in 1 2 3 4 5; do {CTL} pause && {CTL} resume || exit; done"
        ))?;
        running.wait_line(&format!("@@value ending_{life}"))?;
        into_the_guest(host)?;
        host.run(&format!("echo second >/run/vsock/life; {CTL} power-button"))?;
    }
    let result = running.finish()?.success()?;
    drop(servers);
    host.run("[ ! -e /run/vsock/s ] && [ ! -e /run/vsock/s.lock ]; rm -r /run/vsock")?;
    for life in ["first", "second"] {
        let sent = result.value(&format!("sent_{life}"))?;
        for what in ["answer", "late", "many", "paused"] {
            let key = format!("{what}_{life}");
            ensure!(
                result.value(&key)? == sent,
                "{key}: {}",
                result.value(&key)?
            );
        }
        let nobody = result.value(&format!("nobody_{life}"))?;
        ensure!(nobody.trim() == "1", "{nobody}");
    }
    let complaints = result.block("complaints")?;
    ensure!(complaints.is_empty(), "the guest complains:\n{complaints}");
    Ok(())
}

/// A program on the host is heard by one in the guest, and hears it when it has ended its own half.
fn into_the_guest(host: &Host) -> Result<()> {
    let answer = host.run(
        "{ echo CONNECT 5; cat /run/vsock/data; } | socat -t 60 - UNIX-CONNECT:/run/vsock/s >/run/vsock/answer\n\
         head -n 1 /run/vsock/answer; tail -n 1 /run/vsock/answer | cut -d ' ' -f 1; \
         sha256sum </run/vsock/data | cut -d ' ' -f 1",
    )?;
    let lines: Vec<_> = answer.lines().collect();
    tell!("{answer}");
    let [ok, heard, sent] = lines[..] else {
        anyhow::bail!("{answer}");
    };
    ensure!(ok.starts_with("OK ") && heard == sent, "{answer}");
    Ok(())
}

/// Fifty clients whose first words are none, or not all, and who leave.
const NONSENSE: &str = "for each in $(seq 10); do\n\
    for words in '' CONNECT 'CONNECT 5' 'GET / HTTP/1.1' $(head -c 300 /dev/zero | tr '\\0' a); do\n\
    printf '%s' \"$words\" | socat -u - UNIX-CONNECT:/run/vsock/s || true\n\
    done; done 2>/dev/null\n";
