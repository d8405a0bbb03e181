//! Whose time is over, without waiting for it.

use std::io::{Read as _, Write as _};

use super::*;

fn hub(folder: &tempfile::TempDir) -> Hub {
    Hub::new("vsock0", 3, &folder.path().join("s")).unwrap()
}

fn connect(folder: &tempfile::TempDir) -> UnixStream {
    UnixStream::connect(folder.path().join("s")).unwrap()
}

/// Whether the other end has been closed.
fn is_over(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn who_does_not_say_what_it_wants_is_let_go_and_who_did_and_is_not_answered_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let mut hub = hub(&folder);
    let (mut silent, mut slow, mut asking) = (connect(&folder), connect(&folder), connect(&folder));
    slow.write_all(b"CONN").unwrap();
    asking.write_all(b"CONNECT 5\n").unwrap();
    hub.hear();
    hub.hear();
    assert_eq!((hub.peers.len(), hub.callers, hub.keys.len()), (3, 2, 1));
    // Before the tick nothing is looked at, and before their time nobody is let go.
    let now = Instant::now();
    hub.expire(now);
    hub.expire(now + 2 * TICK);
    assert_eq!(hub.peers.len(), 3);
    // A stop of the device is nobody's time.
    hub.resume();
    hub.expire(now + PATIENCE + 3 * TICK);
    assert!(hub.peers.is_empty() && hub.keys.is_empty() && hub.callers == 0);
    // The guest had not been asked yet, and hears nothing.
    assert!(hub.resets.is_empty());
    for stream in [&mut silent, &mut slow, &mut asking] {
        assert!(is_over(stream));
    }
}

#[test]
fn who_has_left_before_its_turn_came_is_nobody_and_the_next_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let mut hub = hub(&folder);
    for line in [
        "",
        "CONN",
        "CONNECT 5\n",
        "\0\u{7f}\n",
        "GET / HTTP/1.1\r\n\r\n",
    ] {
        connect(&folder).write_all(line.as_bytes()).unwrap();
    }
    let mut client = connect(&folder);
    client.write_all(b"CONNECT 5\n").unwrap();
    hub.hear();
    hub.hear();
    assert_eq!((hub.peers.len(), hub.callers, hub.keys.len()), (1, 0, 1));
}

#[test]
fn no_more_programs_are_accepted_than_there_is_room_for_and_the_others_wait() {
    let folder = tempfile::tempdir().unwrap();
    let mut hub = hub(&folder);
    let first: Vec<_> = (0..CALLERS_MOST).map(|_| connect(&folder)).collect();
    for _ in 0..4 {
        hub.hear();
    }
    assert_eq!(hub.callers, CALLERS_MOST);
    let mut late = connect(&folder);
    late.write_all(b"CONNECT 5\n").unwrap();
    hub.hear();
    assert!(!hub.is_unfinished() && hub.keys.is_empty());
    drop(first);
    for _ in 0..4 {
        hub.hear();
    }
    assert_eq!((hub.callers, hub.keys.len()), (0, 1));
}
