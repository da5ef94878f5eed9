//! AES-128-GCM, from AWS-LC (feature `aws-lc`, the default) or from RustCrypto, which is pure Rust and slower. Both
//! give the same bytes.

use super::{TAG_LEN, iv::Iv};

/// Length of the AES key. Native and Go clients derive no other length.
pub(super) const AES_KEY_LEN: usize = 16;

#[cfg(feature = "aws-lc")]
pub(super) use aws_lc::Cipher;
#[cfg(not(feature = "aws-lc"))]
pub(super) use rust_crypto::Cipher;

/// The tag does not match the ciphertext, the IV and the additional data under this key.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unauthentic;

#[cfg(feature = "aws-lc")]
mod aws_lc {
    use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

    use super::{super::derive::CryptoFailed, AES_KEY_LEN, Iv, TAG_LEN, Unauthentic};

    /// An expanded key. AWS-LC wipes it when it frees it.
    pub(in super::super) struct Cipher(LessSafeKey);

    impl Cipher {
        pub(in super::super) fn new(key: &[u8; AES_KEY_LEN]) -> Result<Self, CryptoFailed> {
            let key = UnboundKey::new(&AES_128_GCM, key).map_err(|_| CryptoFailed)?;
            Ok(Self(LessSafeKey::new(key)))
        }

        /// Encrypts `plain` into `ciphertext`, which has the same length.
        pub(in super::super) fn seal(
            &self,
            iv: Iv,
            aad: &[u8],
            plain: &[u8],
            ciphertext: &mut [u8],
            tag: &mut [u8; TAG_LEN],
        ) -> Result<(), CryptoFailed> {
            let nonce = Nonce::assume_unique_for_key(iv);
            self.0
                .seal_out_of_place_scatter(nonce, Aad::from(aad), plain, ciphertext, &[], tag)
                .map_err(|_| CryptoFailed)
        }

        /// Checks `tag` and decrypts `ciphertext` into `plain`, which has the same length.
        pub(in super::super) fn open(
            &self,
            iv: Iv,
            aad: &[u8],
            ciphertext: &[u8],
            tag: &[u8; TAG_LEN],
            plain: &mut [u8],
        ) -> Result<(), Unauthentic> {
            let nonce = Nonce::assume_unique_for_key(iv);
            self.0
                .open_separate_gather(nonce, Aad::from(aad), ciphertext, tag, plain)
                .map_err(|_| Unauthentic)
        }
    }
}

/// Also built for tests of the other backend, which compare the two.
#[cfg(any(test, not(feature = "aws-lc")))]
mod rust_crypto {
    use aes_gcm::{
        Aes128Gcm,
        aead::{AeadInOut as _, KeyInit as _, inout::InOutBuf},
    };

    use super::{super::derive::CryptoFailed, AES_KEY_LEN, Iv, TAG_LEN, Unauthentic};

    /// An expanded key, wiped on drop (feature `zeroize` of `aes-gcm`). Boxed, because moving a key by value would
    /// leave copies on the stack.
    pub(in super::super) struct Cipher(Box<Aes128Gcm>);

    impl Cipher {
        /// Same signature as the other backend; does not fail.
        pub(in super::super) fn new(key: &[u8; AES_KEY_LEN]) -> Result<Self, CryptoFailed> {
            Ok(Self(Box::new(Aes128Gcm::new(key.into()))))
        }

        /// Encrypts `plain` into `ciphertext`, which has the same length.
        pub(in super::super) fn seal(
            &self,
            iv: Iv,
            aad: &[u8],
            plain: &[u8],
            ciphertext: &mut [u8],
            tag: &mut [u8; TAG_LEN],
        ) -> Result<(), CryptoFailed> {
            let buffers = InOutBuf::new(plain, ciphertext).map_err(|_| CryptoFailed)?;
            *tag = self.0.encrypt_inout_detached(&iv.into(), aad, buffers).map_err(|_| CryptoFailed)?.into();
            Ok(())
        }

        /// Checks `tag` and decrypts `ciphertext` into `plain`, which has the same length.
        pub(in super::super) fn open(
            &self,
            iv: Iv,
            aad: &[u8],
            ciphertext: &[u8],
            tag: &[u8; TAG_LEN],
            plain: &mut [u8],
        ) -> Result<(), Unauthentic> {
            let buffers = InOutBuf::new(ciphertext, plain).map_err(|_| Unauthentic)?;
            self.0.decrypt_inout_detached(&iv.into(), aad, buffers, tag.into()).map_err(|_| Unauthentic)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test case 4 of the GCM specification (McGrew and Viega, 2004), cut to this crate's shape: a 12-byte IV
    /// and additional data.
    #[test]
    fn gcm_specification_case_4_is_reproduced() {
        let key = hex("feffe9928665731c6d6a8f9467308308");
        let iv = hex("cafebabefacedbaddecaf888");
        let aad = hex("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        let plain = hex(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525\
             b16aedf5aa0de657ba637b39",
        );
        let sealed = hex(
            "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa05\
             1ba30b396a0aac973d58e091",
        );
        let tag = hex("5bc94fbc3221a5db94fae95ae7121a47");

        let cipher = Cipher::new(key.as_slice().try_into().unwrap()).unwrap();
        let iv: Iv = iv.as_slice().try_into().unwrap();
        let mut out = vec![0; plain.len()];
        let mut our_tag = [0; TAG_LEN];
        cipher.seal(iv, &aad, &plain, &mut out, &mut our_tag).unwrap();
        assert_eq!((out.as_slice(), our_tag.as_slice()), (sealed.as_slice(), tag.as_slice()));
        assert_eq!(cipher.open(iv, &aad, &sealed, &our_tag, &mut out), Ok(()));
        assert_eq!(out, plain);
    }

    #[test]
    fn buffers_of_different_lengths_are_refused() {
        let cipher = Cipher::new(&[7; AES_KEY_LEN]).unwrap();
        assert!(cipher.seal([1; 12], &[], &[0; 5], &mut [0; 4], &mut [0; TAG_LEN]).is_err());
        assert_eq!(cipher.open([1; 12], &[], &[0; 5], &[0; TAG_LEN], &mut [0; 4]), Err(Unauthentic));
    }

    #[cfg(feature = "aws-lc")]
    proptest::proptest! {
        #[test]
        fn backends_agree(
            key: [u8; AES_KEY_LEN],
            iv: Iv,
            aad in proptest::collection::vec(proptest::num::u8::ANY, 0..40),
            plain in proptest::collection::vec(proptest::num::u8::ANY, 0..600),
            flipped in proptest::num::usize::ANY,
        ) {
            let (ours, theirs) = (aws_lc::Cipher::new(&key).unwrap(), rust_crypto::Cipher::new(&key).unwrap());
            let (mut sealed, mut again) = (vec![0; plain.len()], vec![0; plain.len()]);
            let (mut tag, mut tag_again) = ([0; TAG_LEN], [0; TAG_LEN]);
            ours.seal(iv, &aad, &plain, &mut sealed, &mut tag).unwrap();
            theirs.seal(iv, &aad, &plain, &mut again, &mut tag_again).unwrap();
            proptest::prop_assert_eq!((&sealed, tag), (&again, tag_again));
            let mut opened = vec![0; plain.len()];
            proptest::prop_assert_eq!(theirs.open(iv, &aad, &sealed, &tag, &mut opened), Ok(()));
            proptest::prop_assert_eq!(&opened, &plain);
            proptest::prop_assert_eq!(ours.open(iv, &aad, &sealed, &tag, &mut opened), Ok(()));
            proptest::prop_assert_eq!(&opened, &plain);

            let bit = flipped % (8 * (sealed.len() + TAG_LEN));
            let byte = sealed.iter_mut().chain(&mut tag).nth(bit / 8).unwrap();
            *byte ^= 1 << (bit % 8);
            proptest::prop_assert_eq!(ours.open(iv, &aad, &sealed, &tag, &mut opened), Err(Unauthentic));
            proptest::prop_assert_eq!(theirs.open(iv, &aad, &sealed, &tag, &mut opened), Err(Unauthentic));
        }
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }
}
