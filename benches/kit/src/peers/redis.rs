//! A pipelining client of the Redis protocol: `SET` to fill, `GET` to read.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::TcpStream;

use super::BlockSource;

const BLOCK: usize = 4096;

/// A connection to a Redis server whose keys are block numbers.
pub struct RedisClient {
    reader: BufReader<TcpStream>,
    writer: BufWriter<TcpStream>,
    asked: VecDeque<u64>,
    block: Vec<u8>,
    line: String,
}

impl RedisClient {
    /// Talks over `stream`.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Ok(Self {
            reader: BufReader::with_capacity(1 << 20, stream.try_clone()?),
            writer: BufWriter::with_capacity(1 << 20, stream),
            asked: VecDeque::new(),
            block: vec![0; BLOCK + 2],
            line: String::new(),
        })
    }

    /// Stores the blocks of `image` in order.
    pub fn fill(&mut self, image: &[u8]) -> io::Result<()> {
        for (batch, blocks) in image.chunks(256 * BLOCK).enumerate() {
            let mut count = 0;
            for (index, block) in blocks.chunks(BLOCK).enumerate() {
                let key = (batch * 256 + index).to_string();
                write!(self.writer, "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n", key.len(), block.len())?;
                self.writer.write_all(block)?;
                self.writer.write_all(b"\r\n")?;
                count += 1;
            }
            self.writer.flush()?;
            for _ in 0..count {
                self.expect_line("+OK")?;
            }
        }
        Ok(())
    }

    fn expect_line(&mut self, expected: &str) -> io::Result<()> {
        self.line.clear();
        self.reader.read_line(&mut self.line)?;
        if self.line.trim_end() == expected {
            return Ok(());
        }
        Err(io::Error::other(format!("Redis answered {:?}, not {expected:?}", self.line)))
    }
}

impl BlockSource for RedisClient {
    fn request(&mut self, index: u64) -> io::Result<()> {
        let key = index.to_string();
        self.asked.push_back(index);
        write!(self.writer, "*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len())
    }

    fn receive(&mut self) -> io::Result<(u64, &[u8])> {
        if self.reader.buffer().len() < "$4096\r\n\r\n".len() + BLOCK {
            self.writer.flush()?;
        }
        self.expect_line("$4096")?;
        self.reader.read_exact(&mut self.block)?;
        let index = self.asked.pop_front().ok_or_else(|| io::Error::other("an answer without a question"))?;
        Ok((index, &self.block[..BLOCK]))
    }
}
