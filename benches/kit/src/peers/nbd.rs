//! A client of the NBD protocol, as much as reading needs.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::TcpStream;

use super::BlockSource;

const BLOCK: usize = 4096;

/// A connection to an NBD server's default export.
pub struct NbdClient {
    reader: BufReader<TcpStream>,
    writer: BufWriter<TcpStream>,
    block: Vec<u8>,
}

impl NbdClient {
    /// Shakes hands (fixed newstyle, `NBD_OPT_EXPORT_NAME`).
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        let mut reader = BufReader::with_capacity(1 << 20, stream.try_clone()?);
        let mut writer = BufWriter::with_capacity(1 << 16, stream);
        let mut greeting = [0; 18];
        reader.read_exact(&mut greeting)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(io::Error::other("not an NBD server"));
        }
        writer.write_all(&3u32.to_be_bytes())?;
        writer.write_all(b"IHAVEOPT")?;
        writer.write_all(&1u32.to_be_bytes())?;
        writer.write_all(&0u32.to_be_bytes())?;
        writer.flush()?;
        let mut export = [0; 10];
        reader.read_exact(&mut export)?;
        Ok(Self { reader, writer, block: vec![0; BLOCK] })
    }
}

impl BlockSource for NbdClient {
    fn request(&mut self, index: u64) -> io::Result<()> {
        let mut request = [0; 28];
        request[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
        request[8..16].copy_from_slice(&index.to_be_bytes());
        request[16..24].copy_from_slice(&(index * BLOCK as u64).to_be_bytes());
        request[24..].copy_from_slice(&(BLOCK as u32).to_be_bytes());
        self.writer.write_all(&request)
    }

    fn receive(&mut self) -> io::Result<(u64, &[u8])> {
        if self.reader.buffer().len() < 16 + BLOCK {
            self.writer.flush()?;
        }
        let mut head = [0; 16];
        self.reader.read_exact(&mut head)?;
        if head[..8] != [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] {
            return Err(io::Error::other(format!("NBD reply {head:02x?}")));
        }
        self.reader.read_exact(&mut self.block)?;
        let mut index = [0; 8];
        index.copy_from_slice(&head[8..]);
        Ok((u64::from_be_bytes(index), &self.block))
    }
}
