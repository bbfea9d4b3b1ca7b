/* The floor: the null file system served by the smallest loop there is, one read(2) and one write(2) on /dev/fuse for
 * each request, one thread.
 *
 * The null file system (bench/rawfuse_null.py serves the same one): the root directory holds a file `fN` for every
 * number N and the file `data` of 1 TiB; entries are never remembered (entry_valid 0), attributes for a day. Files are
 * opened with FOPEN_DIRECT_IO; they read as zeros and take all writes.
 *
 * usage: floor MOUNTPOINT; ends when it is unmounted. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_WRITE = 1 << 20, DATA_NODE = 2, FIRST_FILE = 16, DAY = 86400 };

static char buffer[MAX_WRITE + 4096] __attribute__((aligned(4096)));
static char zeros[MAX_WRITE] __attribute__((aligned(4096)));
static int device;

static void reply(uint64_t unique, int error, const void *body, size_t size)
{
	struct fuse_out_header header = { .len = sizeof(header) + size, .error = -error, .unique = unique };
	struct iovec parts[2] = { { &header, sizeof(header) }, { (void *)body, size } };

	if (writev(device, parts, size ? 2 : 1) < 0 && errno != ENOENT) {
		perror("floor: reply");
		exit(1);
	}
}

static void fill(struct fuse_attr *attr, uint64_t node)
{
	memset(attr, 0, sizeof(*attr));
	attr->ino = node;
	attr->mode = node == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0644;
	attr->nlink = 1;
	attr->size = node == DATA_NODE ? 1ull << 40 : 0;
	attr->blksize = 4096;
}

static void look_up(const struct fuse_in_header *in, const char *name)
{
	struct fuse_entry_out out = { .attr_valid = DAY };

	if (strcmp(name, "data") == 0) {
		out.nodeid = DATA_NODE;
	} else if (name[0] == 'f') {
		out.nodeid = FIRST_FILE + strtoull(name + 1, NULL, 10);
	} else {
		reply(in->unique, ENOENT, NULL, 0);
		return;
	}
	fill(&out.attr, out.nodeid);
	reply(in->unique, 0, &out, sizeof(out));
}

static void start(const struct fuse_in_header *in, const struct fuse_init_in *init)
{
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION,
		.minor = init->minor < FUSE_KERNEL_MINOR_VERSION ? init->minor : FUSE_KERNEL_MINOR_VERSION,
		.max_readahead = init->max_readahead,
		.flags = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES,
		.max_write = MAX_WRITE,
		.max_pages = MAX_WRITE / 4096,
		.time_gran = 1,
	};

	reply(in->unique, 0, &out, sizeof(out));
}

static void serve(const struct fuse_in_header *in)
{
	const void *body = in + 1;
	struct fuse_attr_out attributes = { .attr_valid = DAY };
	struct fuse_open_out opened = { .open_flags = FOPEN_DIRECT_IO };
	struct fuse_write_out written = { 0 };

	switch (in->opcode) {
	case FUSE_LOOKUP:
		look_up(in, body);
		break;
	case FUSE_READ:
		reply(in->unique, 0, zeros, ((const struct fuse_read_in *)body)->size);
		break;
	case FUSE_WRITE:
		written.size = ((const struct fuse_write_in *)body)->size;
		reply(in->unique, 0, &written, sizeof(written));
		break;
	case FUSE_GETATTR:
		fill(&attributes.attr, in->nodeid);
		reply(in->unique, 0, &attributes, sizeof(attributes));
		break;
	case FUSE_OPEN:
		reply(in->unique, 0, &opened, sizeof(opened));
		break;
	case FUSE_RELEASE:
		reply(in->unique, 0, NULL, 0);
		break;
	case FUSE_INIT:
		start(in, body);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		break;
	default:
		reply(in->unique, ENOSYS, NULL, 0);
	}
}

int main(int argc, char **argv)
{
	char options[128];

	if (argc != 2) {
		fprintf(stderr, "usage: floor MOUNTPOINT\n");
		return 2;
	}
	device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", device);
	if (device < 0 || mount("floor", argv[1], "fuse.floor", MS_NOSUID | MS_NODEV, options) < 0) {
		perror("floor: mount");
		return 1;
	}
	for (;;) {
		if (read(device, buffer, sizeof(buffer)) > 0)
			serve((const struct fuse_in_header *)buffer);
		else if (errno == ENODEV)
			return 0;
		else if (errno != EINTR && errno != ENOENT) {
			perror("floor: read");
			return 1;
		}
	}
}
