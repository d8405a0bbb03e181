//! What known clients send (`tests/kvm/clients`), for the target `request` to begin with.

use std::error::Error;
use std::fs;
use std::path::Path;

/// Writes each request of `clients` to a file of its own in `folder`.
pub fn write(clients: &Path, folder: &Path) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(clients)? {
        let path = entry?.path();
        if path.extension().is_none_or(|end| end != "jsonl") {
            continue;
        }
        let client = path.file_stem().unwrap_or_default().display().to_string();
        for (number, line) in fs::read_to_string(&path)?.lines().enumerate() {
            let step: serde_json::Value = serde_json::from_str(line)?;
            let Some((method, name)) = step["ask"].as_str().and_then(|ask| ask.split_once(' '))
            else {
                continue;
            };
            let body = step["body"].as_str().unwrap_or_default();
            // First how many descriptors come beside it.
            let files = step["taps"].as_u64().unwrap_or(0) as u8;
            let mut text = format!("{method} /api/v1/{name} HTTP/1.1\r\n");
            for header in step["headers"].as_array().into_iter().flatten() {
                let header = header.as_str().unwrap_or_default();
                text += &header.replace("${LEN}", &body.len().to_string());
                text += "\r\n";
            }
            let story = [&[files][..], text.as_bytes(), b"\r\n", body.as_bytes()].concat();
            fs::write(folder.join(format!("{client}-{number}")), story)?;
        }
    }
    Ok(())
}
