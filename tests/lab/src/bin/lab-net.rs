//! Round trips over TCP, for the benchmark of NICs: a byte there, a byte back, one at a time.
//!
//!     lab-net serve ADDRESS:PORT
//!     lab-net trips ADDRESS:PORT SECONDS
//!
//! `serve` answers whoever connects, until it is killed. `trips` says in one line of `key=value` words how many there were
//! in how long.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["serve", address] => serve(address),
        ["trips", address, seconds] => {
            let limit = Duration::from_secs(seconds.parse().context("SECONDS is a number")?);
            let (trips, took) = trips(address, limit)?;
            println!("trips={trips} seconds={:.3}", took.as_secs_f64());
            Ok(())
        }
        _ => bail!("usage: lab-net serve ADDRESS:PORT | lab-net trips ADDRESS:PORT SECONDS"),
    }
}

fn serve(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listening at {address}"))?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        thread::spawn(move || {
            let mut byte = [0];
            // Whoever leaves ends it.
            while stream.set_nodelay(true).is_ok()
                && stream.read_exact(&mut byte).is_ok()
                && stream.write_all(&byte).is_ok()
            {}
        });
    }
    Ok(())
}

fn trips(address: &str, limit: Duration) -> Result<(u64, Duration)> {
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    let began = Instant::now();
    let mut trips = 0_u64;
    loop {
        let sent = [trips.to_le_bytes()[0]];
        let mut back = [0];
        stream.write_all(&sent)?;
        stream.read_exact(&mut back)?;
        if back != sent {
            bail!("{} came back for {}", back[0], sent[0]);
        }
        trips += 1;
        let took = began.elapsed();
        if took >= limit {
            return Ok((trips, took));
        }
    }
}
