//! A data server on this machine's 127.0.0.1, for what moves through the emulated NICs.
//!
//! `GET /BYTES/SEED` sends that many pseudo-random bytes; `POST` takes any number of bytes and
//! answers with their SHA-256. Whoever is behind an emulated NIC reaches it at [`GATEWAY`].

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use sha2::{Digest, Sha256};

use crate::zoo::GATEWAY;

/// What a guest sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// How much.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

/// A running server; it stops when dropped.
#[derive(Debug)]
pub struct DataServer {
    address: SocketAddr,
    uploads: Arc<Mutex<Vec<Upload>>>,
}

impl DataServer {
    /// Starts a server on a free port.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let uploads = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::downgrade(&uploads);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Some(uploads) = kept.upgrade() else {
                    return;
                };
                let Ok(stream) = stream else { continue };
                thread::spawn(move || {
                    // A guest that goes away mid-transfer is the test's to notice.
                    if let Ok(Some(upload)) = serve(stream) {
                        uploads
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(upload);
                    }
                });
            }
        });
        Ok(Self { address, uploads })
    }

    /// The URL, for a guest, of so many bytes grown from a seed.
    pub fn url(&self, bytes: u64, seed: u64) -> String {
        format!("http://{GATEWAY}:{}/{bytes}/{seed}", self.port())
    }

    /// The port on which [`GATEWAY`] takes downloads and uploads.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The SHA-256 of so many bytes grown from a seed, in hexadecimal.
    pub fn sha256(bytes: u64, seed: u64) -> String {
        let mut hash = Sha256::new();
        generate(bytes, seed, |chunk| {
            hash.update(chunk);
            Ok(())
        })
        .expect("hashing cannot fail");
        hexadecimal(&hash.finalize())
    }

    /// What has been sent here so far.
    pub fn uploads(&self) -> Vec<Upload> {
        self.uploads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for DataServer {
    fn drop(&mut self) {
        // The accepting thread sees, at its next connection, that nobody keeps the uploads.
        self.uploads = Arc::default();
        let _ = TcpStream::connect(self.address);
    }
}

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled").
fn generate(
    bytes: u64,
    seed: u64,
    mut sink: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut state = seed.wrapping_mul(2) | 1;
    let mut chunk = vec![0; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        let now = left.min(chunk.len() as u64);
        sink(&chunk[..now as usize])?;
        left -= now;
    }
    Ok(())
}

fn serve(stream: TcpStream) -> io::Result<Option<Upload>> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header.trim_end().is_empty() {
            break;
        }
        let (name, value) = header.split_once(':').unwrap_or_default();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap_or_default();
        }
    }
    let mut words = first.split_ascii_whitespace();
    let (method, path) = (words.next(), words.next().unwrap_or_default());
    if method == Some("POST") {
        let mut body = reader.take(length);
        let mut hash = Sha256::new();
        let mut bytes = 0;
        let mut chunk = [0; 16 << 10];
        loop {
            let read = body.read(&mut chunk)?;
            if read == 0 {
                break;
            }
            hash.update(&chunk[..read]);
            bytes += read as u64;
        }
        let sha256 = hexadecimal(&hash.finalize());
        head(&mut writer, "200 OK", sha256.len() as u64)?;
        writer.write_all(sha256.as_bytes())?;
        return Ok(Some(Upload { bytes, sha256 }));
    }
    let numbers: Option<Vec<u64>> = path
        .trim_start_matches('/')
        .split('/')
        .map(|word| word.parse().ok())
        .collect();
    match numbers.as_deref() {
        Some(&[bytes, seed]) => {
            head(&mut writer, "200 OK", bytes)?;
            generate(bytes, seed, |chunk| writer.write_all(chunk))?;
        }
        _ => head(&mut writer, "404 Not Found", 0)?,
    }
    Ok(None)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn head(writer: &mut impl Write, status: &str, length: u64) -> io::Result<()> {
    write!(
        writer,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(server: &DataServer, request: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.write_all(request).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let body = answer
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .unwrap()
            + 4;
        answer.split_off(body)
    }

    #[test]
    fn what_is_served_has_the_checksum_that_is_told() {
        let server = DataServer::start().unwrap();
        let body = exchange(&server, b"GET /100001/7 HTTP/1.1\r\n\r\n");
        assert_eq!(body.len(), 100_001);
        assert_eq!(
            hexadecimal(&Sha256::digest(&body)),
            DataServer::sha256(100_001, 7)
        );
        assert_ne!(
            DataServer::sha256(100_001, 7),
            DataServer::sha256(100_001, 8)
        );
    }

    #[test]
    fn an_upload_is_answered_with_its_checksum() {
        let server = DataServer::start().unwrap();
        let answer = exchange(
            &server,
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        );
        let expected = hexadecimal(&Sha256::digest(b"hello"));
        assert_eq!(answer, expected.as_bytes());
    }
}
