//! A cpio archive in memory: an initramfs segment that brings a guest its script.

/// A `newc` archive of regular files (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
/// Appended to an initramfs, it adds them to it.
pub(crate) fn archive<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    const REGULAR: u32 = 0o100_755;
    let mut bytes = Vec::new();
    for (number, (name, content)) in files.into_iter().enumerate() {
        append(&mut bytes, number as u32 + 1, REGULAR, name, content);
    }
    append(&mut bytes, 0, 0, "TRAILER!!!", &[]);
    bytes
}

fn append(bytes: &mut Vec<u8>, inode: u32, mode: u32, name: &str, content: &[u8]) {
    let links = 1;
    let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
    bytes.extend_from_slice(b"070701");
    // Inode, mode, owner, group, links, time, size, device and special device numbers, name, check.
    for field in [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
        bytes.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    pad(bytes);
    bytes.extend_from_slice(content);
    pad(bytes);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_the_archive_back() {
        let bytes = archive([("script", &b"echo one\n"[..]), ("data", b"12345")]);
        assert_eq!(bytes.len() % 4, 0);
        let mut cpio = Command::new("cpio")
            .args(["--quiet", "-i", "--to-stdout"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert_eq!(cpio.wait_with_output().unwrap().stdout, b"echo one\n12345");
    }
}
