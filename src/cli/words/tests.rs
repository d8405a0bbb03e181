use super::*;
use crate::cli::schema;
use crate::config::{ConsoleConfig, MemoryConfig};
use proptest::prelude::*;

fn memory(text: &str) -> Result<MemoryConfig, String> {
    let place = SourcePlace::Flag("memory", text.to_owned());
    schema::MEMORY
        .make(text, &place)
        .map_err(|error| error.to_string())
}

fn serial(text: &str) -> Result<ConsoleConfig, String> {
    let place = SourcePlace::Flag("serial", text.to_owned());
    schema::SERIAL
        .make(text, &place)
        .map_err(|error| error.to_string())
}

#[test]
fn what_is_not_said_stays_as_it_was() {
    let mut config = memory("size=1G,shared=on").unwrap();
    let place = SourcePlace::Flag("memory", String::new());
    schema::MEMORY
        .apply(&mut config, "size=2G", &place)
        .unwrap();
    assert!(config.shared);
    assert_eq!(config.size, 2 << 30);
}

#[test]
fn consoles_are_words_or_places() {
    assert_eq!(serial("pty"), Ok(ConsoleConfig::Pty));
    assert_eq!(serial("file=/a=b"), Ok(ConsoleConfig::file("/a=b")));
    let sized = ConsoleConfig::File {
        path: "/a".into(),
        size: 64 << 10,
    };
    assert_eq!(serial("file=/a,size=64K"), Ok(sized.clone()));
    assert_eq!(serial("size=64K,file=/a"), Ok(sized.clone()));
    for text in ["size=64K", "pty,size=64K", "size=64K,socket=/s"] {
        assert_eq!(
            serial(text),
            Err(format!(
                "--serial {text}: size: it is the size of a file: it goes with file=PATH"
            ))
        );
    }
    // What was said of a file before stays, key by key.
    let mut config = sized;
    let place = SourcePlace::Flag("serial", String::new());
    schema::SERIAL
        .apply(&mut config, "file=/b", &place)
        .unwrap();
    schema::SERIAL
        .apply(&mut config, "size=1M", &place)
        .unwrap();
    let expected = ConsoleConfig::File {
        path: "/b".into(),
        size: 1 << 20,
    };
    assert_eq!(config, expected);
    assert_eq!(serial("socket=/s"), Ok(ConsoleConfig::Socket("/s".into())));
    assert_eq!(
        serial("file=/a,pty"),
        Err("--serial file=/a,pty: only one of these can be said".to_owned())
    );
}

#[test]
fn errors_name_flag_key_value_and_reason() {
    for (text, expected) in [
        (
            "size=5X",
            "--memory size=5X: size: `5X` is not a size: write a whole",
        ),
        (
            "sise=5G",
            "--memory: unknown key `sise`; did you mean `size`? (there are: size,",
        ),
        (
            "5G",
            "--memory 5G: `5G` has no key: write key=value; the keys are size, ",
        ),
        (
            "size=1G,size=2G",
            "--memory size=1G,size=2G: `size` is given twice",
        ),
        (
            "size=1G,",
            "--memory size=1G,: there is nothing between two commas",
        ),
        (
            "size=[1G]",
            "--memory size=[1G]: size: `[1G]` is not a size",
        ),
    ] {
        let said = memory(text).unwrap_err();
        assert!(said.starts_with(expected), "{text:?} gave {said:?}");
    }
}

#[test]
fn a_device_is_an_address_or_a_path_but_not_both() {
    let make = |text: &str| {
        let place = SourcePlace::Flag("device", text.to_owned());
        schema::DEVICE
            .make(text, &place)
            .map_err(|error| error.to_string())
    };
    let bare = make("01:00.0,id=nvme").unwrap();
    assert_eq!(bare.id.as_deref(), Some("nvme"));
    assert_eq!(
        bare.path,
        make("path=/sys/bus/pci/devices/0000:01:00.0/")
            .unwrap()
            .path
    );
    assert!(make("01:00.0,path=02:00.0").unwrap_err().contains("twice"));
    assert!(
        make("id=nvme")
            .unwrap_err()
            .contains("`path` or `fd` is missing")
    );
    assert!(make("path=nvme0").unwrap_err().contains("0000:01:00.0"));
}

proptest! {
    #[test]
    fn no_text_is_too_odd(text: String) {
        let _memory = memory(&text);
        let _serial = serial(&text);
    }

    #[test]
    fn what_is_written_is_read(size: u64, shared: bool, prefault: bool) {
        let switch = |on| if on { "on" } else { "off" };
        let text = format!(
            "size={size},shared={},prefault={}", switch(shared), switch(prefault)
        );
        let read = memory(&text).unwrap();
        prop_assert_eq!(read.size, size);
        prop_assert_eq!((read.shared, read.prefault), (shared, Some(prefault)));
    }
}
