//! What happens to a VM, told as it happens to whoever started the process: `--event-monitor`.
//!
//! An event is one JSON object in Cloud Hypervisor's words, and goes out in one write, at the place where it
//! happens. Nobody waits for who reads it: what does not fit is lost, as is everything once nobody reads, and what is
//! beyond 16 MiB in a file. Where nobody asked for events an event costs a look at a flag.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The longest event: what a pipe takes whole or not at all is 4096 bytes (pipe(7), `PIPE_BUF`), and libvirt reads
/// one byte less.
const MOST: usize = 4095;
/// The most bytes in a file that stays: a guest that resets its devices again and again makes events, and nobody takes
/// them out of it.
const FILE_MOST: u64 = 16 << 20;
/// How many lost events are told of.
const TOLD: u32 = 3;

/// Who an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// This process.
    Vmm,
    /// The VM.
    Vm,
    /// One of its virtio devices.
    VirtioDevice,
    /// What runs in it.
    Guest,
}

impl Source {
    const fn word(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Vm => "vm",
            Self::VirtioDevice => "virtio-device",
            Self::Guest => "guest",
        }
    }
}

static MONITOR: OnceLock<Monitor> = OnceLock::new();

#[derive(Debug)]
struct Monitor {
    output: File,
    start: Instant,
    /// Bytes that may still be written, where it is no pipe or the like.
    left: Option<AtomicU64>,
    lost: AtomicU32,
}

/// Tells events to `output` from now on. There is one monitor in a process.
///
/// # Errors
/// ioctl(2), FIONBIO: whoever writes to it might have to wait; fstat(2)
pub(crate) fn start(output: File) -> io::Result<()> {
    let monitor = Monitor::new(output)?;
    // The first one stays.
    drop(MONITOR.set(monitor));
    Ok(())
}

/// Tells that `event` has happened, with the names of those that it is about.
pub(crate) fn tell(source: Source, event: &str, properties: &[(&str, &str)]) {
    if let Some(monitor) = MONITOR.get() {
        monitor.tell(source, event, properties);
    }
}

impl Monitor {
    fn new(output: File) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&output, true)?;
        let stays = output.metadata()?.is_file();
        Ok(Self {
            output,
            left: stays.then(|| AtomicU64::new(FILE_MOST)),
            start: Instant::now(),
            lost: AtomicU32::new(0),
        })
    }

    fn tell(&self, source: Source, event: &str, properties: &[(&str, &str)]) {
        let text = encode(self.start.elapsed(), source, event, properties);
        if let Err(error) = self.write(text.as_bytes())
            && self.lost.fetch_add(1, Ordering::Relaxed) < TOLD
        {
            log::debug!("--event-monitor: {event} is lost: {error}");
        }
    }

    fn write(&self, event: &[u8]) -> io::Result<()> {
        let length = event.len() as u64;
        let take = |left: u64| left.checked_sub(length);
        if let Some(left) = &self.left
            && left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                .is_err()
        {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        (&self.output).write(event).map(drop)
    }
}

/// The bytes of an event. What it is about is left out where the whole would be too long.
fn encode(since: Duration, source: Source, event: &str, properties: &[(&str, &str)]) -> String {
    let head = format!(
        "{{\n  \"timestamp\": {{\n    \"secs\": {},\n    \"nanos\": {}\n  }},\n  \"source\": \"{}\",\n  \"event\": \
         \"{event}\",\n  \"properties\": ",
        since.as_secs(),
        since.subsec_nanos(),
        source.word()
    );
    let lines = properties
        .iter()
        .map(|(key, value)| format!("    {}: {}", quoted(key), quoted(value)));
    let lines = match properties {
        [] => "null".to_owned(),
        _ => format!("{{\n{}\n  }}", lines.collect::<Vec<_>>().join(",\n")),
    };
    const END: &str = "\n}\n\n";
    match head.len() + lines.len() + END.len() {
        0..=MOST => head + &lines + END,
        _ => head + "null" + END,
    }
}

/// A text in JSON, in ASCII. Some readers count braces without regard to texts, so that it has none.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        if matches!(character, ' '..='~') && !matches!(character, '"' | '\\' | '{' | '}') {
            quoted.push(character);
        } else {
            // RFC 8259 §7: beyond U+FFFF by the two halves of UTF-16.
            for unit in character.encode_utf16(&mut [0; 2]) {
                quoted.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_event_is_written_as_cloud_hypervisors_clients_read_it() {
        let since = Duration::new(7, 5);
        let text = encode(since, Source::Vm, "device-removed", &[("id", "disk0")]);
        let expected = "{\n  \"timestamp\": {\n    \"secs\": 7,\n    \"nanos\": 5\n  },\n  \"source\": \"vm\",\n  \
                        \"event\": \"device-removed\",\n  \"properties\": {\n    \"id\": \"disk0\"\n  }\n}\n\n";
        assert_eq!(text, expected);
        let text = encode(since, Source::Vmm, "starting", &[]);
        let event: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(event["properties"], Value::Null);
    }

    #[test]
    fn nobody_waits_for_who_does_not_read_and_nothing_happens_when_they_are_gone() {
        let (mut reader, writer) = io::pipe().unwrap();
        let monitor = Monitor::new(File::from(std::os::fd::OwnedFd::from(writer))).unwrap();
        monitor.tell(Source::Vm, "booted", &[]);
        let mut first = [0; MOST];
        let count = reader.read(&mut first).unwrap();
        let event: Value = serde_json::from_slice(&first[..count]).unwrap();
        assert_eq!(
            (&event["source"], &event["event"]),
            (&json!("vm"), &json!("booted"))
        );
        // More than a pipe holds.
        for _ in 0..10_000 {
            monitor.tell(Source::Vm, "paused", &[]);
        }
        assert!(monitor.lost.load(Ordering::Relaxed) > 0);
        drop(reader);
        monitor.tell(Source::Vm, "resumed", &[]);
    }

    #[test]
    fn a_file_of_events_does_not_grow_without_bound() {
        let file = tempfile::tempfile().unwrap();
        let monitor = Monitor::new(file.try_clone().unwrap()).unwrap();
        monitor
            .left
            .as_ref()
            .unwrap()
            .store(1000, Ordering::Relaxed);
        for _ in 0..100 {
            monitor.tell(Source::VirtioDevice, "reset", &[("id", "net0")]);
        }
        let length = file.metadata().unwrap().len();
        assert!((500..=1000).contains(&length), "{length}");
        assert!(monitor.lost.load(Ordering::Relaxed) > 90);
    }

    proptest! {
        #[test]
        fn whatever_a_device_is_called_an_event_is_whole_and_short(id: String, event in "[a-z-]{1,20}") {
            let text = encode(Duration::MAX, Source::VirtioDevice, &event, &[("id", &id)]);
            prop_assert!(text.is_ascii() && text.len() <= MOST);
            prop_assert_eq!(text.matches('{').count(), text.matches('}').count());
            let value: Value = serde_json::from_str(&text).unwrap();
            if let Some(told) = value["properties"]["id"].as_str() {
                prop_assert_eq!(told, id);
            } else {
                prop_assert!(id.len() > 500);
            }
        }
    }
}
