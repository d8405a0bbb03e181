use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_sys_util::poll::{PollContext, WatchingEvents};

use super::*;

fn quit() -> EventFd {
    EventFd::new().unwrap()
}

fn open(config: ConsoleConfig) -> Endpoint {
    Endpoint::open(&config, &quit()).unwrap().unwrap()
}

/// Waits for the reader as an event loop does, until it has bytes.
fn receive(reader: &mut Reader) -> Vec<u8> {
    let poll: PollContext<u32> = PollContext::new().unwrap();
    poll.add_fd_with_events(reader, WatchingEvents::empty().set_read(), 0)
        .unwrap();
    let mut buffer = [0; 64];
    loop {
        let events = poll.wait_timeout(Duration::from_secs(20)).unwrap();
        assert_ne!(events.iter().count(), 0, "nothing came");
        match reader.read(&mut buffer) {
            Input::Bytes(count) => return buffer[..count].to_vec(),
            Input::Nothing => {}
            Input::Closed => panic!("closed"),
        }
    }
}

#[test]
fn off_is_nothing_and_null_swallows() {
    assert!(
        Endpoint::open(&ConsoleConfig::Off, &quit())
            .unwrap()
            .is_none()
    );
    let mut null = open(ConsoleConfig::Null);
    null.writer.write_all(b"gone").unwrap();
    null.writer.drain();
    assert!(null.reader.is_none());
}

#[test]
fn the_terminal_is_one_consoles_until_its_writers_are_gone() {
    let (_, pipe) = io::pipe().unwrap();
    let claim = Claim::take().unwrap();
    let writer = Writer::to_terminal(OwnedFd::from(pipe).into(), claim).unwrap();
    let escape = Escape::new(quit(), writer.clone());
    drop(writer);
    let second = Endpoint::open(&ConsoleConfig::Tty, &quit()).unwrap_err();
    assert!(matches!(second, ConsoleError::TerminalTaken), "{second}");
    drop(escape);
    assert!(Claim::take().is_some());
}

#[test]
fn a_file_has_all_output_when_the_writer_drops() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut endpoint = open(ConsoleConfig::file(path.clone()));
    let line = [b'x'; 1000];
    for _ in 0..1000 {
        endpoint.writer.write_all(&line).unwrap();
    }
    drop(endpoint);
    assert!(fs::read(path).unwrap() == [b'x'; 1_000_000]);
}

#[test]
fn a_file_that_cannot_be_made_is_an_error_that_names_it() {
    let config = ConsoleConfig::file("/nowhere/log");
    let error = Endpoint::open(&config, &quit()).unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot write the console's output to /nowhere/log: No such file or directory (os error 2)"
    );
}

#[test]
fn what_a_guest_writes_to_a_file_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut endpoint = open(ConsoleConfig::File {
        path: path.clone(),
        size: 16 << 10,
    });
    for number in 0..100_000 {
        writeln!(endpoint.writer, "{number:>9}").unwrap();
    }
    drop(endpoint);
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    let (before, last) = (read("log.1"), read("log"));
    assert!(before.len() <= 16 << 10 && last.len() <= 16 << 10);
    let kept = before + &last;
    assert!(kept.len() > 16 << 10);
    assert!(kept.ends_with("    99999\n"), "the end is there");
}

#[test]
fn a_file_is_not_reached_by_a_link() {
    let folder = tempfile::tempdir().unwrap();
    let (victim, path) = (folder.path().join("victim"), folder.path().join("log"));
    fs::write(&victim, "secret").unwrap();
    std::os::unix::fs::symlink(&victim, &path).unwrap();
    let error = Endpoint::open(&ConsoleConfig::file(&path), &quit()).unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
    assert_eq!(fs::read_to_string(victim).unwrap(), "secret");
}

#[test]
fn a_pty_carries_both_ways_and_says_where_it_is() {
    let mut endpoint = open(ConsoleConfig::Pty);
    let path = endpoint.location.clone().unwrap();
    let mut user = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    endpoint.writer.write_all(b"a\r\n").unwrap();
    let mut buffer = [0; 3];
    user.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"a\r\n");
    user.write_all(b"\x01x\x03").unwrap();
    let reader = endpoint.reader.as_mut().unwrap();
    assert_eq!(receive(reader), b"\x01x\x03", "nothing is taken out");
    drop(user);
    let mut again = OpenOptions::new().write(true).open(&path).unwrap();
    again.write_all(b"back").unwrap();
    assert_eq!(receive(reader), b"back", "after the user has left");
}

#[test]
fn a_socket_serves_one_client_after_another_and_turns_a_second_away() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut endpoint = open(ConsoleConfig::Socket(path.clone()));
    let reader = endpoint.reader.as_mut().unwrap();
    for _ in 0..3 {
        endpoint.writer.write_all(b"to nobody").unwrap();
        endpoint.writer.drain();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"in").unwrap();
        assert_eq!(receive(reader), b"in");
        let mut second = UnixStream::connect(&path).unwrap();
        second
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut buffer = [0; 16];
        assert_eq!(reader.read(&mut buffer), Input::Nothing);
        assert_eq!(second.read(&mut buffer).unwrap(), 0, "turned away");
        endpoint.writer.write_all(b"out").unwrap();
        let count = client.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"out");
        drop(client);
        assert_eq!(reader.read(&mut buffer), Input::Nothing);
    }
    let error = Endpoint::open(&ConsoleConfig::Socket(path.clone()), &quit()).unwrap_err();
    assert!(error.to_string().contains("must be removed first"));
}

#[test]
fn a_stalled_reader_costs_a_second_once_and_later_learns_what_it_missed() {
    let (mut reader, pipe) = io::pipe().unwrap();
    let mut writer = Writer::to_file(OwnedFd::from(pipe).into()).unwrap();
    let start = Instant::now();
    let line = [b'.'; 1024];
    for _ in 0..1024 {
        writer.write_all(&line).unwrap();
    }
    let taken = start.elapsed();
    assert!(taken >= Duration::from_millis(900), "it waits: {taken:?}");
    assert!(taken < Duration::from_secs(10), "but once: {taken:?}");
    let collector = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).map(|_| all)
    });
    writer.drain();
    // The first byte the reader took ended the stall.
    while format!("{writer:?}") != "Writer { waiting: 0 }" {
        writer.drain();
    }
    writer.write_all(b"end").unwrap();
    drop(writer);
    let all = collector.join().unwrap().unwrap();
    let kept = all.iter().filter(|&&byte| byte == b'.').count();
    let lost = (1 << 20) - kept;
    let notice = format!("\r\n[busway: {lost} bytes of output lost here]\r\nend");
    assert!(lost > 0 && all.ends_with(notice.as_bytes()));
}

#[test]
fn output_to_a_reader_that_left_is_dropped_at_once() {
    let (reader, pipe) = io::pipe().unwrap();
    let mut writer = Writer::to_file(OwnedFd::from(pipe).into()).unwrap();
    drop(reader);
    let start = Instant::now();
    for _ in 0..1024 {
        writer.write_all(&[0; 1024]).unwrap();
    }
    writer.drain();
    assert!(start.elapsed() < Duration::from_millis(900));
}

#[test]
fn input_that_another_process_took_first_is_not_waited_for() {
    let (pipe, mut writer) = io::pipe().unwrap();
    let mut other = pipe.try_clone().unwrap();
    let mut own = File::from(unshared(pipe.into()));
    writer.write_all(b"ab").unwrap();
    other.read_exact(&mut [0; 2]).unwrap();
    let (reported, heard) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        reported
            .send(own.read(&mut [0; 8]).map_err(|error| error.kind()))
            .unwrap();
        own
    });
    let found = heard.recv_timeout(Duration::from_secs(60));
    writer.write_all(b"c").unwrap();
    assert_eq!(found, Ok(Err(io::ErrorKind::WouldBlock)));
    let own = reading.join().unwrap();
    let escape = Escape::new(quit(), Writer::null());
    let mut reader = Reader::terminal(own.into(), escape, None).unwrap();
    assert_eq!(receive(&mut reader), b"c");
}

/// Waits until `quit` is signalled, as the machine's event loop does.
fn heard(quit: &EventFd) -> bool {
    let poll: PollContext<u32> = PollContext::new().unwrap();
    poll.add_fd_with_events(quit, WatchingEvents::empty().set_read(), 0)
        .unwrap();
    let events = poll.wait_timeout(Duration::from_secs(20)).unwrap();
    events.iter().count() > 0
}

#[test]
fn the_escape_key_is_heard_while_nobody_reads_and_nothing_that_was_typed_is_lost() {
    let (pipe, mut writer) = io::pipe().unwrap();
    let quit = quit();
    let escape = Escape::new(quit.clone(), Writer::null());
    let mut reader = Reader::terminal(unshared(pipe.into()), escape, None).unwrap();
    let typed: Vec<u8> = (0..40_000_u32).map(|i| 2 + (i % 200) as u8).collect();
    writer.write_all(&typed).unwrap();
    writer.write_all(b"\x01xand on").unwrap();
    assert!(heard(&quit));
    let mut got = Vec::new();
    while got.len() < typed.len() + 6 {
        got.extend(receive(&mut reader));
    }
    assert!(got == [&typed[..], b"and on"].concat());
    drop(writer);
    while reader.read(&mut [0; 8]) != Input::Closed {
        std::thread::yield_now();
    }
}

#[test]
fn a_reader_that_nobody_reads_from_drops_though_more_is_typed_than_fits() {
    let (pipe, mut writer) = io::pipe().unwrap();
    let escape = Escape::new(quit(), Writer::null());
    let reader = Reader::terminal(unshared(pipe.into()), escape, None).unwrap();
    // Twice what two pipes hold.
    let typing = std::thread::spawn(move || writer.write_all(&[b'.'; 256 << 10]));
    drop(reader);
    // The pipe that was typed into is closed: nobody waits for room in it.
    typing.join().unwrap().unwrap_err();
}

#[test]
fn the_escape_key_quits_sends_itself_and_helps() {
    let (mut shown, pipe) = io::pipe().unwrap();
    let output = Writer::to_file(OwnedFd::from(pipe).into()).unwrap();
    let quit = quit();
    let mut escape = Escape::new(quit.clone(), output);
    let mut type_keys = |keys: &[u8]| {
        let mut bytes = keys.to_vec();
        let kept = escape.filter(&mut bytes);
        bytes.truncate(kept);
        bytes
    };
    assert_eq!(type_keys(b"ls\x01a\x01\x01\r"), b"ls\x01\x01\r");
    assert_eq!(type_keys(b"q\x01"), b"q");
    assert_eq!(type_keys(b"a"), b"\x01", "across reads");
    assert_eq!(type_keys(b"\x01h."), b".");
    assert_eq!(quit.take(), 0);
    assert_eq!(type_keys(b"\x01x"), b"");
    assert_eq!(quit.take(), 1);
    drop(escape);
    let mut help = String::new();
    shown.read_to_string(&mut help).unwrap();
    assert!(help.contains("Ctrl-A x quits"), "{help}");
}

proptest! {
    #[test]
    fn without_the_escape_key_input_is_untouched_however_it_is_cut(
        bytes in proptest::collection::vec(2_u8.., 0..100), cut in 0_usize..100
    ) {
        let mut escape = Escape::new(quit(), Writer::null());
        let cut = cut.min(bytes.len());
        let mut seen = Vec::new();
        for part in [&bytes[..cut], &bytes[cut..]] {
            let mut part = part.to_vec();
            let kept = escape.filter(&mut part);
            seen.extend_from_slice(&part[..kept]);
        }
        prop_assert_eq!(seen, bytes);
    }
}
